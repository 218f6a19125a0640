"""What speculation brings where an answer repeats its prompt, and what it costs where none does.

The arithmetic is the model's, the answers are scripts: a logit is raised at each position, so that
the same tokens are drawn with speculation and without, of a model that was never taught to rewrite.
Every round runs the same script both ways, one after the other, and a ratio holds within a round.
"""

import pydoc_data.topics
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from bitwatt_kernels.backend import StepLayout
from bitwatt_kernels.registry import choose_backend
from torch import Tensor

from bitwatt import builtin
from bitwatt.bench.measure import spread_of
from bitwatt.checkpoints.registry import load_model
from bitwatt.engine.core import EngineCore
from bitwatt.engine.messages import EngineStats, Submit
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.presets import PRESETS
from bitwatt.model.random_weights import random_model
from bitwatt.model.runner import ModelRunner
from bitwatt.model.transformer import Transformer
from bitwatt.scheduling.blocks import BlockAllocator
from bitwatt.scheduling.request import ResolvedSampling
from bitwatt.scheduling.scheduler import Scheduler
from bitwatt.text.codec import TextCodec

__all__ = ["Script", "bench_speculation", "edited"]

_NUM_TOKENS = 256  # of a prompt, and of an answer
_TOKENS_AN_EDIT = 16
_MAX_MODEL_LEN = 1024
_BATCHES = (1, 8)


@dataclass(frozen=True, slots=True)
class Script:
    """A prompt, and the answer that is drawn."""

    prompt: list[int]
    answer: list[int]


class _ScriptedModel:
    """A model whose likeliest token at each position is the script's."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._tokens = torch.zeros(_MAX_MODEL_LEN + 1, dtype=torch.int64)  # by position
        self._positions = torch.empty(0, dtype=torch.int64)  # of the step's tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def follow(self, script: Script) -> None:
        tokens = script.prompt + script.answer
        self._tokens[: len(tokens)] = torch.tensor(tokens)

    def hidden_states(
        self,
        token_ids: Tensor,
        layout: StepLayout,
        kv_cache: KVCache,
        *,
        before_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        self._positions = layout.positions
        return self._model.hidden_states(token_ids, layout, kv_cache, before_layers=before_layers)

    def logits(self, h: Tensor, logit_tokens: Tensor) -> Tensor:
        logits = self._model.logits(h, logit_tokens)
        behind = self._tokens[self._positions[logit_tokens] + 1]
        logits[torch.arange(len(behind)), behind] = 1e9
        return logits


def bench_speculation(
    *,
    repeats: int = 5,
    preset: str = "2B4T",
    num_layers: int | None = None,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Return tokens/s with and without, and their ratio, by model, workload and batch.

    rewriting  the prompt once more, with an edit of one to three tokens among every 16
    prose      text of another page than the prompt's, which repeats a word now and then
    fresh      tokens drawn at random, which repeat nothing

    repeats     rounds, each of another text, after one that warms up
    preset      of the model with random weights; beside it runs the embedded one
    num_layers  fewer than the preset's, for a quick look; figures are of what ran
    """
    codec = TextCodec.from_folder(builtin.TERNARY)
    workloads = _workloads(codec, repeats + 1)
    choice = choose_backend(torch.device("cpu"))
    config = PRESETS[preset]
    shape = replace(config, num_layers=num_layers or config.num_layers)
    models: dict[str, Callable[[], Transformer]] = {
        "embedded": lambda: load_model(
            builtin.TERNARY,
            weights="ternary",
            backend=choice.backend,
            dtype=torch.bfloat16,
            max_model_len=_MAX_MODEL_LEN,
            head_bits=16,
        ),
        preset: lambda: random_model(
            shape, weights="ternary", backend=choice.backend, dtype=torch.bfloat16, seed=0
        ),
    }
    results: dict[str, Any] = {"backend": choice.backend.name, "num_layers": shape.num_layers}
    for name, make in models.items():
        pair = _Pair(make())
        results[name] = {}
        for workload, scripts in workloads.items():
            for batch in _BATCHES:
                figures = pair.measure(scripts, batch)
                results[name][f"{workload}, batch {batch}"] = figures
                report(
                    f"{name}, {workload}, batch {batch}: "
                    f"{figures['tokens_per_s']['off']['median']:.1f} tok/s, "
                    f"{figures['ratio']['median']:.3f}x with drafts, "
                    f"{figures['num_accepted_tokens']} of {figures['num_draft_tokens']} accepted"
                )
        pair.close()
    return results


def edited(tokens: Sequence[int], chance: random.Random, vocab_size: int) -> list[int]:
    """Return the tokens with one edit among every 16: some replaced, put in, or left out."""
    result: list[int] = []
    for start in range(0, len(tokens), _TOKENS_AN_EDIT):
        part = list(tokens[start : start + _TOKENS_AN_EDIT])
        where, count = chance.randrange(len(part)), chance.randint(1, 3)
        new = [chance.randrange(5, vocab_size) for _ in range(count)]
        num_old = {"replace": count, "insert": 0, "delete": count}
        kind = chance.choice(list(num_old))
        part[where : where + num_old[kind]] = [] if kind == "delete" else new
        result += part
    return result


def _workloads(codec: TextCodec, count: int) -> dict[str, list[Script]]:
    chance = random.Random(0)  # noqa: S311
    vocab_size = len(codec.vocabulary)
    pages = [codec.encode(text) for text in pydoc_data.topics.topics.values()]
    pages = [page[:_NUM_TOKENS] for page in pages if len(page) >= _NUM_TOKENS][: 2 * count]
    prompts, others = pages[:count], pages[count:]
    random_tokens = [
        [chance.randrange(5, vocab_size) for _ in range(2 * _NUM_TOKENS)] for _ in range(count)
    ]
    return {
        "rewriting": [Script(page, edited(page, chance, vocab_size)) for page in prompts],
        "prose": [Script(a, b) for a, b in zip(prompts, others, strict=True)],
        "fresh": [Script(some[:_NUM_TOKENS], some[_NUM_TOKENS:]) for some in random_tokens],
    }


class _Pair:
    """Two engines of one model: without speculation and with it."""

    def __init__(self, model: Transformer) -> None:
        self._model = _ScriptedModel(model)
        self._cores = {
            name: self._make_core(model, speculates=name == "on") for name in ("off", "on")
        }

    def _make_core(self, model: Transformer, *, speculates: bool) -> EngineCore:
        num_seqs = max(_BATCHES)
        kv_cache = KVCache(
            model.config, num_seqs * _MAX_MODEL_LEN // 16, model.dtype, torch.device("cpu")
        )
        kv_cache.layers.zero_()
        scheduler = Scheduler(
            BlockAllocator(kv_cache.num_blocks, 16, prefix_caching=False),
            max_num_seqs=num_seqs,
            max_num_batched_tokens=512,
            max_model_len=_MAX_MODEL_LEN,
            speculates=speculates,
        )
        runner = ModelRunner(
            cast(Transformer, self._model),
            kv_cache,
            max_num_seqs=num_seqs,
            max_num_batched_tokens=512,
            max_model_len=_MAX_MODEL_LEN,
        )
        return EngineCore(scheduler, runner)

    def measure(self, scripts: Sequence[Script], batch: int) -> dict[str, Any]:
        rates: dict[str, list[float]] = {"off": [], "on": []}
        before = self._cores["on"].stats()
        for i, script in enumerate(scripts):
            self._model.follow(script)
            order = ("off", "on") if i % 2 else ("on", "off")
            for name in order:
                rate = _rate(self._cores[name], script, batch)
                if i:  # the first is a warm-up
                    rates[name].append(rate)
        ratios = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
        return {
            "tokens_per_s": {name: asdict(spread_of(some)) for name, some in rates.items()},
            "ratio": asdict(spread_of(ratios)),
            **_drafted(before, self._cores["on"].stats()),
        }

    def close(self) -> None:
        for core in self._cores.values():
            core.close()


def _drafted(before: EngineStats, after: EngineStats) -> dict[str, int]:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    return {name: getattr(after, name) - getattr(before, name) for name in names}


def _rate(core: EngineCore, script: Script, batch: int) -> float:
    """Return the tokens/s of the answers behind their first tokens, all of one script."""
    sampling = ResolvedSampling(max_tokens=len(script.answer), temperature=0.0)
    for i in range(batch):
        core.submit(Submit(request_id=str(i), prompt_token_ids=script.prompt, sampling=sampling))
    answers: dict[str, list[int]] = {str(i): [] for i in range(batch)}
    started, num_first = 0.0, 0
    while core.has_work:
        for output in core.step():
            answers[output.request_id] += output.token_ids
        if not started and all(answers.values()):
            started, num_first = time.perf_counter(), sum(map(len, answers.values()))
    seconds = time.perf_counter() - started
    assert all(answer == script.answer for answer in answers.values())
    return (batch * len(script.answer) - num_first) / seconds
