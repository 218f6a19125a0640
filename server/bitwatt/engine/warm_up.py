"""Requests before the first caller's: what they run through is warm, and nothing tells of them."""

from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import Submit
from bitwatt.model.runner_protocol import Runner
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler

__all__ = ["warm_up"]

_NUM_PROMPT_TOKENS = 32
_NUM_TOKENS = 4
_SAMPLINGS = (
    ResolvedSampling(max_tokens=_NUM_TOKENS, temperature=0.0),
    ResolvedSampling(max_tokens=_NUM_TOKENS, temperature=1.0, top_p=0.9, top_k=20),
    ResolvedSampling(max_tokens=_NUM_TOKENS, temperature=0.0, logprobs=1),
)


def warm_up(runner: Runner, scheduler: Scheduler) -> None:
    """Run requests of each kind to their end: prompts, steps of one token, greedy and drawn.

    PyTorch and the kernels' threads start with them, and weights are read for the first time.

    scheduler  of the runner's cache, used for nothing else: what it counts and caches goes with it
    """
    core = EngineCore(scheduler, runner)
    most = min(scheduler.max_model_len, scheduler.max_num_batched_tokens) - _NUM_TOKENS
    prompt = [i % runner.vocab_size for i in range(max(1, min(_NUM_PROMPT_TOKENS, most)))]
    for i, sampling in enumerate(_SAMPLINGS):
        core.submit(Submit(request_id=str(i), prompt_token_ids=prompt, sampling=sampling))
        while core.has_work:
            core.step()
