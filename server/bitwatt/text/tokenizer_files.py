"""What a Hugging Face folder says of its text: tokenizer, special tokens and chat templates.

Read as transformers 5 reads it: PreTrainedTokenizerBase._from_pretrained and TokenizersBackend.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from stat import S_ISREG
from typing import Any

from tokenizers import AddedToken, Tokenizer

from bitwatt.errors import CheckpointError, shorten
from bitwatt.text.encoding import raised_as

__all__ = ["SAMPLING_NAMES", "TokenizerFiles", "read_tokenizer_files"]

logger = logging.getLogger(__name__)

SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What is read of generation_config.json besides token ids, by names of SamplingParams."""

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_OTHER_SPECIAL_TOKENS = ("extra_special_tokens", "additional_special_tokens")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_FILE_BYTES = 256 * 1024 * 1024
_MAX_GROWTH = 64  # of a text by its normalizer: a body of 2 MB then takes 128


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """What a folder, or a GGUF file, holds for text.

    special_tokens     texts by name: bos_token, eos_token and so on
    templates          sources by name; "default" is the one for conversations without tools
    control_tokens     added tokens that direct the model besides the special ones, where it's told
    sampling_defaults  what the model's authors recommend, by SAMPLING_NAMES, of any value
    config             what tokenizer_config.json holds; nothing of a GGUF file
    """

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    templates: Mapping[str, str]
    control_tokens: tuple[str, ...] | None
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> bytes:
        """Return the tokenizer's settings as JSON, as transformers keeps them and vLLM tells them.

        Tokens are texts, the chat template is the one for conversations without tools, and names of
        files are left out.
        """
        added = self.tokenizer.get_added_tokens_decoder()
        told = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: value for name, value in self.config.items() if not name.endswith("_file")},
            **self.special_tokens,
            "added_tokens_decoder": {str(i): token.content for i, token in sorted(added.items())},
            "chat_template": self.templates.get("default"),
        }
        # Python reads and writes NaN and Infinity, which JSON lacks: they become null.
        strict = json.loads(json.dumps(told), parse_constant=lambda _: None)
        return json.dumps(strict, separators=(",", ":")).encode()


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Return what the folder holds for text.

    Raises  CheckpointError of one line, with the file and what is wrong with it
    """
    path = folder / "tokenizer.json"
    config_path = folder / "tokenizer_config.json"
    data = _read(path)
    if data is None:
        raise CheckpointError(f"{path} is missing; a model folder needs its tokenizer")
    config = _read_object(config_path)
    tokens = _Tokens(folder, config)
    with raised_as(lambda cause: CheckpointError(f"{path} can't be read: {cause}")):
        tokenizer = Tokenizer.from_buffer(data)
        _refuse_growth(tokenizer, path)
        tokens.add_to(tokenizer)
    listed = config.get("chat_control_tokens")
    if listed is not None and not _is_texts(listed):
        raise CheckpointError(f"{config_path} has chat_control_tokens that aren't a list of texts")
    return TokenizerFiles(
        tokenizer,
        {name: token.content for name, token in tokens.named.items()},
        _read_templates(folder, config),
        None if listed is None else tuple(listed),
        _read_sampling(folder / "generation_config.json"),
        config=config,
    )


def _read_sampling(path: Path) -> dict[str, float]:
    given = _read_object(path)
    found = {name: given[name] for name in SAMPLING_NAMES if given.get(name) is not None}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path} has {name} of {shorten(value)}; a number is needed")
    return found


def _refuse_growth(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse a normalizer that makes much of little: 26 times "f" to "ff" takes gigabytes."""
    if tokenizer.normalizer is None:
        return
    growth = _growth_by(json.loads(tokenizer.normalizer.__getstate__()))
    if growth > _MAX_GROWTH:
        raise CheckpointError(
            f"{path} has a normalizer that makes texts up to {growth:.3g} times as long; "
            f"the limit is {_MAX_GROWTH}"
        )


def _growth_by(step: Mapping[str, Any]) -> float:
    """Return how many characters the replacements of a normalizer can make of one."""
    if step["type"] == "Sequence":
        return prod(map(_growth_by, step["normalizers"]))
    if step["type"] != "Replace":
        return 1.0
    replaced, written = step["pattern"].get("String"), len(step["content"])
    if replaced:
        return max(1.0, written / len(replaced))
    return 1.0 + written  # an expression may match nothing, between any two characters


class _Tokens:
    """The tokens that a folder's files name beside tokenizer.json.

    named  the special tokens that have a name
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._path = folder / "tokenizer_config.json"
        self._by_id: dict[int, AddedToken] = {}
        self._unnamed: list[AddedToken] = []
        self.named: dict[str, AddedToken] = {}
        if "added_tokens_decoder" in config:  # takes the place of the older files
            self._read_decoder(config["added_tokens_decoder"])
            self._read_specials(config)
        else:
            self._read_specials(config | _read_object(folder / "special_tokens_map.json"))
            self._read_added(folder / "added_tokens.json")

    def add_to(self, tokenizer: Tokenizer) -> None:
        """Add the tokens that the tokenizer lacks, or has with other flags."""
        known = tokenizer.get_added_tokens_decoder()
        flags_known = {repr(token) for token in known.values()}
        missing = [
            token for _, token in sorted(self._by_id.items()) if repr(token) not in flags_known
        ]
        contents = {token.content for token in [*known.values(), *missing]}
        for token in [*self.named.values(), *self._unnamed]:
            if token.content not in contents:
                contents.add(token.content)
                missing.append(token)
        if missing:
            tokenizer.add_tokens(missing)
        for token_id, token in self._by_id.items():
            actual = tokenizer.token_to_id(token.content)
            if actual != token_id:
                logger.warning(
                    "%s: %s is token %s of tokenizer.json and not %d",
                    self._path.parent,
                    shorten(token.content),
                    actual,
                    token_id,
                )

    def _read_decoder(self, decoder: Any) -> None:
        if not isinstance(decoder, Mapping):
            raise CheckpointError(f"{self._path} has an added_tokens_decoder that isn't an object")
        for token_id, value in decoder.items():
            if not token_id.isascii() or not token_id.isdigit() or len(token_id) > 9:
                raise CheckpointError(
                    f"{self._path} has token id {shorten(token_id)} in added_tokens_decoder"
                )
            self._by_id[int(token_id)] = _token(value, "added_tokens_decoder", self._path)

    def _read_specials(self, settings: Mapping[str, Any]) -> None:
        by_content = {token.content: token for token in self._by_id.values()}
        own_names = [name for name in settings if name.endswith("_token")]
        for name in dict.fromkeys([*_NAMED_TOKENS, *own_names]):  # in this order they get their ids
            value = settings.get(name)
            is_token = isinstance(value, str) or (isinstance(value, Mapping) and "content" in value)
            if is_token or (name in _NAMED_TOKENS and value is not None):
                token = _token(value, name, self._path, special=True)
                self.named[name] = by_content.get(token.content, token)
        for name in _OTHER_SPECIAL_TOKENS:
            others = settings.get(name) or []
            if isinstance(others, Mapping):
                for key, value in others.items():
                    self.named[key] = _token(value, name, self._path, special=True)
            elif isinstance(others, list):
                self._unnamed += [_token(value, name, self._path, special=True) for value in others]
            else:
                raise CheckpointError(f"{self._path} has {name} that aren't a list")

    def _read_added(self, path: Path) -> None:
        specials = {token.content for token in [*self.named.values(), *self._unnamed]}
        for content, token_id in _read_object(path).items():
            if not isinstance(token_id, int) or not 0 <= token_id < 10**9:
                raise CheckpointError(f"{path} has {shorten(token_id)} for {shorten(content)}")
            is_special = content in specials
            self._by_id[token_id] = AddedToken(
                _encodable(content, path), normalized=not is_special, special=is_special
            )


def _token(value: Any, name: str, path: Path, **flags: bool) -> AddedToken:
    """Return the token that a text, or an object with its content and flags, names."""
    if isinstance(value, Mapping):
        given = {flag: value[flag] for flag in _TOKEN_FLAGS if flag in value}
        content = value.get("content")
        if all(isinstance(flag, bool) for flag in given.values()):
            flags = given | flags
        else:
            content = None
    else:
        content = value
    if not isinstance(content, str):
        raise CheckpointError(f"{path} has {name} of {shorten(value)}; a token's text is needed")
    return AddedToken(_encodable(content, path), **flags)


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the folder's templates by name; files go before tokenizer_config.json."""
    templates = {}
    path = folder / "chat_template.jinja"
    for name, file in [("default", path), *_named_template_files(folder)]:
        data = _read(file)
        if data is None:
            continue
        try:
            templates[name] = data.decode("utf-8-sig")  # a byte order mark is no part of it
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file} is not in UTF-8: {error}") from error
    if templates:
        return templates
    config_path = folder / "tokenizer_config.json"
    given = config.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        given = {"default": given}
    elif isinstance(given, list) and all(isinstance(entry, Mapping) for entry in given):
        given = {entry.get("name"): entry.get("template") for entry in given}
    if not isinstance(given, Mapping) or not _is_texts([*given, *given.values()]):
        raise CheckpointError(
            f"{config_path} has a chat_template that is neither a text nor a list of names and "
            "templates"
        )
    return {name: source.removeprefix("\ufeff") for name, source in given.items()}


def _named_template_files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        yield path.name.removesuffix(".jinja"), path


def _read_object(path: Path) -> dict[str, Any]:
    """Return what the JSON file holds; nothing where there is none."""
    data = _read(path)
    if data is None:
        return {}
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object but {shorten(value)}")
    return value


def _read(path: Path) -> bytes | None:
    """Return the regular file's content, or None where there is none, nor a link to one."""
    try:
        if not path.is_symlink() and not path.exists():
            return None
        status = path.stat()
        if not S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        size = status.st_size
        if size > _MAX_FILE_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; {_MAX_FILE_BYTES} are taken")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}") from error


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _encodable(text: str, path: Path) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path} has a token that is no text: {_one_line(error)}") from error
    return text


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
