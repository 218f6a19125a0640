"""Requests before the first caller's: what they run through is warm, and nothing tells of them."""

from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import Submit
from bitwatt.model.runner_protocol import Runner
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["warm_up"]

_NUM_PROMPT_TOKENS = 32
_NUM_TOKENS = 2
_TURNS = (
    (ResolvedSampling(max_tokens=_NUM_TOKENS, temperature=0.0),),
    (
        ResolvedSampling(max_tokens=_NUM_TOKENS, temperature=1.0, top_p=0.9, top_k=20),
        ResolvedSampling(max_tokens=_NUM_TOKENS, temperature=0.0, logprobs=1),
    ),
)
"""Requests that run together, turn after turn."""


def warm_up(runner: Runner, scheduler: Scheduler) -> None:
    """Run some requests to their end: prompts and steps of one token, alone and in a batch.

    PyTorch and the kernels' threads start with them, and weights are read for the first time.

    scheduler  of the runner's cache, used for nothing else: what it counts and caches goes with it
    """
    core = EngineCore(scheduler, runner)
    num_tokens = max(1, min(_NUM_PROMPT_TOKENS, scheduler.max_model_len - _NUM_TOKENS))
    prompt = [i % runner.vocab_size for i in range(num_tokens)]
    for turn in _TURNS:
        for name, sampling in enumerate(turn):
            core.submit(Submit(request_id=str(name), prompt_token_ids=prompt, sampling=sampling))
        while core.has_work:
            core.step()
