"""What two models are compared by: one figure each, from pairs of windows."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bitwatt_client.cost import usd_of_rent_per_million_tokens
from bitwatt_client.exposition import Samples
from bitwatt_client.load import Window
from bitwatt_client.server import Roofline
from bitwatt_client.statistics import Interval, Spread, bootstrap_ratio, spread

__all__ = ["Figure", "Measured", "make_figures", "roofline_figure"]

WEIGHT_KINDS = ("packed_weights", "embedding", "other_weights")
HELD_KINDS = (*WEIGHT_KINDS, "kv_cache")

Better = Literal["higher", "lower"]
Rents = tuple[float | None, float | None]


ENERGY_REASONS = {
    "no_powercap": "the CPU has no energy counter, as in most virtual machines",
    "not_readable": "the CPU's energy counter can't be read by the server's user",
    "off": "the server doesn't measure energy (--energy-source)",
    "other_device": "the energy source that was asked for measures another device",
    "no_device": "the engine's device is not known",
    "no_library": "the server lacks nvidia-ml-py, which reads the GPU's counter",
    "no_driver": "the NVIDIA driver's library does not start there",
    "no_uuid": "the engine doesn't know which GPU it runs on",
    "not_supported": "the GPU doesn't tell its energy",
    "mig": "the engine runs on a slice of a GPU, and the counter is the whole GPU's",
}
"""What the label `reason` of bitwatt_energy_available says, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A window of a model with the server's /metrics around it; None where it serves none."""

    name: str
    window: Window
    before: Samples | None = None
    after: Samples | None = None

    @property
    def joules(self) -> float | None:
        """What the model's steps took of its device's measured energy; None if unmeasured.

        Idle power of the moments in which its steps ran is in it; waiting time is not.
        """
        if self.before is None or self.after is None:
            return None
        joules = 0.0
        for phase in ("prefill", "decode"):
            labels = {"model_name": self.name, "phase": phase}
            after = self.after.total("bitwatt_energy_joules_total", **labels)
            if after is None:
                return None
            joules += after - (self.before.total("bitwatt_energy_joules_total", **labels) or 0.0)
        return joules if joules > 0 else None

    @property
    def why_no_joules(self) -> str | None:
        """What the server says of energy it does not measure, in words."""
        if self.after is None:
            return None
        found = self.after.find("bitwatt_energy_available", model_name=self.name)
        reason = next((s.labels.get("reason") for s in found if not s.value), None)
        return None if reason is None else ENERGY_REASONS.get(reason, reason)

    def held_bytes(self, kinds: Sequence[str]) -> float | None:
        """Return the memory the model's engine holds of these kinds; None where it doesn't say."""
        if self.after is None:
            return None
        name = "bitwatt_memory_bytes"
        held = [self.after.total(name, model_name=self.name, kind=kind) for kind in kinds]
        return sum(value or 0.0 for value in held) or None


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One thing measured of both models.

    gain         how many times better a is than b; below 1 it is worse; None of a value that each
                 model has of its own
    unavailable  why there is no value
    """

    key: str
    label: str
    unit: str
    better: Better
    a: Spread | None = None
    b: Spread | None = None
    gain: Interval | None = None
    unavailable: str | None = None


def make_figures(a: Sequence[Measured], b: Sequence[Measured], rents: Rents) -> list[Figure]:
    """Return every figure of these pairs of windows.

    rents  US dollars an hour of a and b; over the windows' wall-clock time, so at this load alone
    """

    def lower(key: str, label: str, unit: str) -> Figure:
        return Figure(key=key, label=label, unit=unit, better="lower")

    def rate(key: str, label: str) -> Figure:
        return Figure(key=key, label=label, unit="tok/s", better="higher")

    no_joules = a[-1].why_no_joules or b[-1].why_no_joules or "the server reports no energy"
    no_memory = "the server reports no memory by kind"
    return [
        _compared(
            rate("tokens_per_s", "output tokens/s, all requests"),
            [m.window.tokens_per_s for m in a],
            [m.window.tokens_per_s for m in b],
        ),
        _compared(
            rate("decode_tokens_per_s", "decode tokens/s a request, median"),
            [_decode_tokens_per_s(m) for m in a],
            [_decode_tokens_per_s(m) for m in b],
            "the answers were read at once, which leaves no time between tokens",
        ),
        _compared(
            lower("ttft_s", "time to first token, median", "s"),
            [statistics.median(answer.ttft_s for answer in m.window.answers) for m in a],
            [statistics.median(answer.ttft_s for answer in m.window.answers) for m in b],
        ),
        _compared(
            lower("e2e_s", "request latency, median", "s"),
            [statistics.median(answer.e2e_s for answer in m.window.answers) for m in a],
            [statistics.median(answer.e2e_s for answer in m.window.answers) for m in b],
        ),
        _compared(
            lower("joules_per_token", "energy a token", "J"),
            [_joules_per_token(m) for m in a],
            [_joules_per_token(m) for m in b],
            no_joules,
        ),
        _compared(
            lower("usd_per_million_tokens", "rent a million output tokens", "$"),
            [usd_of_rent_per_million_tokens(rents[0], m.window.tokens_per_s) for m in a],
            [usd_of_rent_per_million_tokens(rents[1], m.window.tokens_per_s) for m in b],
            "no rent is set (--usd-per-hour)",
        ),
        _compared(
            lower("weights_bytes", "weights", "B"),
            [a[-1].held_bytes(WEIGHT_KINDS)],
            [b[-1].held_bytes(WEIGHT_KINDS)],
            no_memory,
        ),
        _compared(
            lower("memory_bytes", "weights and KV cache", "B"),
            [a[-1].held_bytes(HELD_KINDS)],
            [b[-1].held_bytes(HELD_KINDS)],
            no_memory,
        ),
    ]


def roofline_figure(decode: Figure, rooflines: tuple[Roofline, Roofline]) -> Figure:
    """Return which share of its own roofline each model decodes at.

    Of weights that take milliseconds to read, a low share tells a weak baseline. Batches need not
    be of one: a step reads the weights once for all its requests.

    decode  decode tokens/s of a request
    """
    figure = Figure(
        key="roofline_share", label="decode, of its own roofline", unit="%", better="higher"
    )
    reason = next((r.unavailable for r in rooflines if r.unavailable is not None), None)
    if reason is not None or decode.a is None or decode.b is None:
        return replace(figure, unavailable=reason or decode.unavailable)
    a, b = (
        replace(
            rates,
            median=100 * roofline.share(rates.median),
            low=100 * roofline.share(rates.low),
            high=100 * roofline.share(rates.high),
        )
        for rates, roofline in zip((decode.a, decode.b), rooflines, strict=True)
    )
    return replace(figure, a=a, b=b)


def _compared(
    figure: Figure,
    a: Sequence[float | None],
    b: Sequence[float | None],
    unavailable: str | None = None,
) -> Figure:
    """Return the figure with the pairs that have a value on both sides."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x and y and x > 0 and y > 0]
    if not pairs:
        return replace(figure, unavailable=unavailable or "nothing was measured")
    of_a, of_b = [x for x, _ in pairs], [y for _, y in pairs]
    above, below = (of_a, of_b) if figure.better == "higher" else (of_b, of_a)
    return replace(figure, a=spread(of_a), b=spread(of_b), gain=bootstrap_ratio(above, below))


def _decode_tokens_per_s(measured: Measured) -> float | None:
    times = [answer.tpot_s for answer in measured.window.answers if answer.tpot_s]
    return 1 / statistics.median(times) if times else None


def _joules_per_token(measured: Measured) -> float | None:
    joules = measured.joules
    return None if joules is None else joules / measured.window.num_tokens
