"""How much a prompt token weighs beside a generated one, learned from the steps' times."""

__all__ = ["TokenWeights"]


class TokenWeights:
    """Seconds of a prefill token and of a decode token, by least squares over recent steps.

    A step's time is modelled as prefill · num_prefill + decode · num_decode, without an intercept:
    what a step takes whatever it computes is borne by its tokens. Older steps fade. The fields
    _pp, _pd, _dd, _pt and _dt are the entries of the normal equations of this least squares, with
    p prefill tokens, d decode tokens and t seconds of a step:

        Σpp · prefill + Σpd · decode = Σpt
        Σpd · prefill + Σdd · decode = Σdt
    """

    def __init__(self, *, half_life_steps: float = 500) -> None:
        self._decay = 0.5 ** (1 / half_life_steps)
        self._pp = self._pd = self._dd = self._pt = self._dt = 0.0
        self.prefill = 1.0
        self.decode = 1.0

    def observe(self, num_prefill: int, num_decode: int, seconds: float) -> None:
        """Take in a step of this many tokens of each kind."""
        if not num_prefill and not num_decode:
            return
        decay = self._decay
        self._pp = self._pp * decay + num_prefill * num_prefill
        self._pd = self._pd * decay + num_prefill * num_decode
        self._dd = self._dd * decay + num_decode * num_decode
        self._pt = self._pt * decay + num_prefill * seconds
        self._dt = self._dt * decay + num_decode * seconds
        self._solve()

    def _solve(self) -> None:
        determinant = self._pp * self._dd - self._pd * self._pd
        if determinant <= 1e-9 * self._pp * self._dd:
            return  # singular: one kind alone so far, or both always in the same proportion
        prefill = (self._pt * self._dd - self._dt * self._pd) / determinant
        decode = (self._dt * self._pp - self._pt * self._pd) / determinant
        if prefill > 0 and decode > 0:
            self.prefill, self.decode = prefill, decode
        elif decode > 0:  # a weight below zero is no weight: fit the other alone
            self.prefill, self.decode = 0.0, self._dt / self._dd
        elif prefill > 0:
            self.prefill, self.decode = self._pt / self._pp, 0.0
