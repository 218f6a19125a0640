"""The engine without a server, for Python users: batches prompts in this process."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from tokenizers import Tokenizer

from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import EngineConfig, EngineInfo, Submit, TokenLogprobs
from bitwatt.errors import InvalidRequestError
from bitwatt.scheduling.request import FinishReason, SamplingParams

__all__ = ["LLM", "Generation"]


@dataclass(frozen=True, slots=True)
class Generation:
    """What one prompt brought.

    text       of token_ids, special tokens left out
    token_ids  with the stop token that ended it, if one did
    logprobs   as many as token_ids where they were asked for, else empty
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    logprobs: list[TokenLogprobs]
    num_cached_tokens: int


class LLM:
    """A model loaded into this process. Not thread-safe; close it, or use it as a context.

    with LLM("path/to/folder") as llm:
        [generation] = llm.generate(["def main():"], SamplingParams(max_tokens=32))
    """

    def __init__(self, model: str | Path, **config: object) -> None:
        """Load a Hugging Face folder; config takes EngineConfig's fields.

        Raises  EngineError, CheckpointError or KernelError with the reason and the knob
        """
        path = Path(model)
        self._core, self.info = build_engine(EngineConfig(model_path=str(path), **config))  # type: ignore[arg-type]
        self._tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    info: EngineInfo

    def generate(
        self,
        prompts: Sequence[str | list[int]],
        sampling: SamplingParams | Sequence[SamplingParams],
    ) -> list[Generation]:
        """Return one generation a prompt, in order; prompts run as one batch.

        prompts   texts, or token ids
        sampling  one for all, or one each; the model's end-of-sequence tokens end each. As in
                  the server a seed of 0 is a seed like any other.
        Raises    InvalidRequestError if a prompt is empty or too long
        """
        if isinstance(sampling, SamplingParams):
            sampling = [sampling] * len(prompts)
        if len(sampling) != len(prompts):
            raise InvalidRequestError(
                f"there are {len(prompts)} prompts and {len(sampling)} sampling parameters"
            )
        prefix = secrets.token_hex(4)
        names = [f"{prefix}-{i}" for i in range(len(prompts))]
        try:
            for name, prompt, params in zip(names, prompts, sampling, strict=True):
                self._submit(name, prompt, params)
        except InvalidRequestError:
            self._core.abort(names)
            raise
        return self._run(names)

    def close(self) -> None:
        """Release the model."""
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, name: str, prompt: str | list[int], sampling: SamplingParams) -> None:
        token_ids = self._tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        if not token_ids:
            raise InvalidRequestError("a prompt has at least one token", param="prompts")
        stops = (*sampling.stop_token_ids, *self.info.eos_token_ids)
        refused = self._core.submit(
            Submit(
                request_id=name,
                prompt_token_ids=token_ids,
                sampling=replace(sampling, stop_token_ids=stops),
            )
        )
        if refused is not None:
            raise InvalidRequestError(refused.error or "refused", param="prompts")

    def _run(self, names: list[str]) -> list[Generation]:
        tokens: dict[str, list[int]] = {name: [] for name in names}
        logprobs: dict[str, list[TokenLogprobs]] = {name: [] for name in names}
        done: dict[str, Generation] = {}
        while self._core.has_work:
            for output in self._core.step():
                name = output.request_id
                tokens[name] += output.token_ids
                logprobs[name] += output.logprobs
                if output.finish_reason is not None:
                    done[name] = Generation(
                        self._tokenizer.decode(tokens[name]),
                        tokens[name],
                        output.finish_reason,
                        logprobs[name],
                        output.num_cached_tokens,
                    )
        return [done[name] for name in names]
