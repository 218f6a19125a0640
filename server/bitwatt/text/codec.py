"""Everything a model needs of text, in the calling thread: encode, render, decode."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bitwatt.errors import CheckpointError, InvalidRequestError, shorten
from bitwatt.text.chat_template import ALLOWED_KWARGS, ChatTemplate
from bitwatt.text.output import OutputText
from bitwatt.text.vocabulary import Vocabulary

__all__ = ["TEMPLATE_TIME_LIMIT_S", "TextCodec"]

TEMPLATE_TIME_LIMIT_S = 2.0

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class TextCodec:
    """The tokenizer and the chat template of one model. Safe in any thread."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        tokenizer.no_truncation()  # a folder's own setting would cut prompts in silence
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self.vocabulary = Vocabulary(tokenizer)

    @classmethod
    def from_folder(cls, folder: Path) -> "TextCodec":
        """Return the text side of a Hugging Face folder.

        Reads tokenizer.json and, where they are, tokenizer_config.json and chat_template.jinja.
        Raises  CheckpointError if a file is missing or not what it should be
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; a model folder needs its tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise CheckpointError(f"{path} can't be read: {error}") from error
        return cls(tokenizer, _read_template(folder))

    def output(self, stops: Sequence[str] = ()) -> OutputText:
        """Return a new choice's text."""
        return OutputText(self.vocabulary, stops)

    def encode(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        add_special_tokens: bool = True,
        param: str = "prompt",
    ) -> list[int]:
        """Return the text's tokens.

        max_tokens  a text that is certain to have more is refused before it is encoded
        param       the request's field that an error names

        Raises  InvalidRequestError with context_length_exceeded
        """
        if max_tokens is not None:
            self._refuse_hopeless(text, max_tokens, param)
        # The batch call lets go of the interpreter while it works; encode() does not.
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        token_ids: list[int] = encoding.ids
        return token_ids

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Return the messages as the model's template puts them; encode it without special tokens.

        Developers speak as the system, which templates know.

        Raises  InvalidRequestError if there is no template, if it refuses the messages or takes
                more than TEMPLATE_TIME_LIMIT_S, or for kwargs that a caller may not set
        """
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions, or LLM.generate",
                param="messages",
            )
        kwargs = kwargs or {}
        for name, value in kwargs.items():
            if name not in ALLOWED_KWARGS or not isinstance(value, bool):
                raise InvalidRequestError(
                    f"chat_template_kwargs has {shorten(name)}: {shorten(value)}; allowed are "
                    f"{', '.join(sorted(ALLOWED_KWARGS))}, true or false",
                    param="chat_template_kwargs",
                )
        return self._template.render(
            [_as_system(message) for message in messages],
            kwargs={"add_generation_prompt": add_generation_prompt, **kwargs},
            time_limit_s=TEMPLATE_TIME_LIMIT_S,
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the tokens' text, special tokens spelled out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)

    def _refuse_hopeless(self, text: str, max_tokens: int, param: str) -> None:
        at_least = -(-len(text) // self.vocabulary.max_bytes)
        if at_least > max_tokens:
            raise InvalidRequestError(
                f"prompt has at least {at_least} tokens; the limit is {max_tokens} "
                "(--max-model-len)",
                param=param,
                code="context_length_exceeded",
            )


def _as_system(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _read_template(folder: Path) -> ChatTemplate | None:
    config: dict[str, Any] = {}
    path = folder / "tokenizer_config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}") from error
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    path = folder / "chat_template.jinja"
    if path.is_file():
        source = path.read_text(encoding="utf-8")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, _special_tokens(config))


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens
