"""Models by their names on Hugging Face's hub, ORG/NAME[:FILE][@REVISION]. No torch.

`huggingface_hub` asks, downloads and keeps the cache, and is imported when a name is asked for: it
takes 0.2 s. It reads HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE.
"""

import errno
import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from bitwatt.errors import HubError, shorten

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["HubModel", "fetch", "named"]

_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(:(?P<file>[^:@\s]+))?(@(?P<revision>[^:@\s]+))?", re.ASCII
)
_COMMIT = re.compile("[0-9a-f]{40}")
# What is ever downloaded, beside GGUF files.
_TEXTS = re.compile(r"[\w.-]+\.(json|jinja)|additional_chat_templates/[\w.-]+\.jinja", re.ASCII)
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
_GGUF = re.compile(r"([\w.+-]+/)*(?P<name>[\w.+-]+)\.gguf", re.ASCII | re.IGNORECASE)
_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.\w+)")
_MAX_NAMES_TOLD = 12

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model on the hub.

    file      a GGUF file, or what its name ends in: Q2_0 for NAME-Q2_0.gguf; None for a folder's
              safetensors, or for the only GGUF there is
    revision  a branch, tag or commit; None is the main branch
    """

    repository: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file = "" if self.file is None else f":{self.file}"
        return f"{self.repository}{file}" + ("" if self.revision is None else f"@{self.revision}")


def named(source: str | Path) -> Path | HubModel:
    """Return the path, or else the model of the hub, that a person means.

    A Path is one, and so is a text that begins with ., / or ~, or where something is.
    """
    path = Path(source)
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or _exists(path):
        return Path(os.path.expanduser(path))  # noqa: PTH111  # Path's raises for a user unknown
    match = _NAME.fullmatch(source)
    return path if match is None else HubModel(**match.groupdict())


def fetch(source: str | Path) -> Path:
    """Return the path that a source is, or where the hub's cache has the model that it names.

    What the cache lacks is downloaded first: configuration, tokenizer, chat templates, and either
    safetensors or one GGUF, whose file's path is returned in place of a folder's.

    Raises  HubError with the URL, the reason and the knob
    """
    model = named(source)
    if isinstance(model, Path):
        return model
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(model, "HF_HUB_OFFLINE is set")
    if model.revision is not None and _COMMIT.fullmatch(model.revision):
        try:  # what a commit holds never changes
            return _cached(model, "")
        except HubError:
            pass
    return _downloaded(model)


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def _downloaded(model: HubModel) -> Path:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    url = f"{constants.ENDPOINT}/{model.repository}"
    try:
        found = HfApi().model_info(
            model.repository,
            revision=model.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except HFValidationError as error:
        raise HubError(f"{shorten(str(model))} is no name of the hub's: {error}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 429 or status >= 500:
            return _cached(model, f"{url} answers {status}")
        raise HubError(_refusal(model, url, error)) from error
    except Exception as error:  # of the HTTP library, another one in each version of the hub's
        return _cached(model, f"{url} can't be reached: {_cause(error)}")
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
    names = _chosen(model, sizes, url)
    cache = Path(constants.HF_HUB_CACHE)
    folder = cache.joinpath(
        f"models--{model.repository.replace('/', '--')}", "snapshots", str(found.sha)
    )
    missing = [name for name in names if not (folder / name).exists()]
    num_bytes = sum(sizes[name] for name in missing)
    if missing:
        _refuse_if_full(model, num_bytes, cache)
        logger.info(
            "%s: downloading %d files, %.3f GB, from %s to %s",
            model,
            len(missing),
            num_bytes / 1e9,
            url,
            cache,
        )
    try:
        _download(model, missing or names[:1])  # which also notes the branch's commit
    except HfHubHTTPError as error:
        raise HubError(_refusal(model, url, error)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise HubError(_lack_of_room(model, num_bytes, cache)) from error
        if error.errno is None:
            raise HubError(_broken_off(model, url, error)) from error
        raise HubError(f"{model} can't be kept in {cache}: {error.strerror} (HF_HOME)") from error
    except Exception as error:
        raise HubError(_broken_off(model, url, error)) from error
    if not all((folder / name).exists() for name in names):
        raise HubError(_broken_off(model, url, ConnectionError("it has changed meanwhile")))
    return _at(folder, names)


def _download(model: HubModel, names: list[str]) -> None:
    """Download the files one by one, each with a bar on a terminal.

    snapshot_download has threads, for which Ctrl-C would wait until each has its file whole.
    """
    from huggingface_hub import hf_hub_download

    for name in names:
        hf_hub_download(model.repository, name, revision=model.revision)


def _cached(model: HubModel, reason: str) -> Path:
    """Return where the cache has the model; say so, with the reason why the hub wasn't asked."""
    from huggingface_hub import constants, snapshot_download

    try:
        # No pattern: every version returns the folder, whatever it lacks.
        folder = Path(
            snapshot_download(
                model.repository,
                revision=model.revision,
                local_files_only=True,
                allow_patterns=[],
            )
        )
        files = [path for path in folder.rglob("*") if path.is_file()]
        names = _chosen(model, [path.relative_to(folder).as_posix() for path in files], str(folder))
    except (OSError, ValueError, HubError) as error:
        lack = f": {error}" if isinstance(error, HubError) else ""
        raise HubError(
            f"{reason}, and the cache {constants.HF_HUB_CACHE} lacks {model}{lack}. Where there is "
            f"a network, `hf download {_hf_arguments(model)}` fills a cache (HF_HOME) to take "
            "here; HF_ENDPOINT names a mirror of the hub"
        ) from error
    if reason:
        logger.warning("%s: %s; served is the cache's commit %s", model, reason, folder.name)
    return _at(folder, names)


def _chosen(model: HubModel, names: Iterable[str], where: str) -> list[str]:
    """Return what of a repository's files is taken, the GGUF alone or its first part at the start.

    Raises  HubError where that is none, or not told by the name
    """
    present = set(names)
    ggufs = sorted(name for name in present if _GGUF.fullmatch(name))
    if model.file is not None:
        return _gguf(model.file, ggufs, where, len(present))
    weights = {name for name in present if _WEIGHTS.fullmatch(name)}
    if "model.safetensors" in weights:  # the reader takes it, too, whatever is beside it
        weights = {"model.safetensors"}
    if weights:
        needed = {part for name in weights for part in _parts(name)}
        if needed - present:
            raise HubError(f"{where} lacks {min(needed - present)}")
        return [*sorted(name for name in present if _TEXTS.fullmatch(name)), *sorted(needed)]
    models = [name for name in ggufs if not name.rpartition("/")[2].startswith("mmproj")]
    whole = [next(parts) for _, parts in groupby(models, lambda name: tuple(_parts(name)))]
    if not whole:
        raise HubError(f"{where} has neither model.safetensors, or its parts, nor a GGUF file")
    if len(whole) > 1:
        raise HubError(
            f"{where} has {len(whole)} GGUF files; name one as "
            f"{HubModel(model.repository, 'FILE', model.revision)}: {_listed(whole)}"
        )
    return _gguf(whole[0], ggufs, where, len(present))


def _gguf(file: str, ggufs: list[str], where: str, num_files: int) -> list[str]:
    found = [name for name in ggufs if name == file]
    ending = f"-{file}.gguf".lower()
    found = found or [name for name in ggufs if name.lower().endswith(ending)]
    if len(found) != 1:
        there = f"its GGUF files are {_listed(ggufs)}" if ggufs else f"none of {num_files} is GGUF"
        raise HubError(f"{where} has no GGUF file {shorten(file)}; {there}")
    parts = _parts(found[0])
    lacking = [name for name in parts if name not in ggufs]
    if lacking:
        raise HubError(f"{where} lacks {lacking[0]}")
    return parts


def _parts(name: str) -> list[str]:
    """Return all files of a model that is split, of which this is one; else the name."""
    match = _PART.fullmatch(name)
    if match is None or not 0 < int(match["number"]) <= int(match["count"]) <= 1000:
        return [name]
    return [
        f"{match['stem']}-{number:05}-of-{match['count']}{match['ending']}"
        for number in range(1, int(match["count"]) + 1)
    ]


def _at(folder: Path, names: list[str]) -> Path:
    return folder / names[0] if _GGUF.fullmatch(names[0]) else folder


def _refusal(model: HubModel, url: str, error: "HfHubHTTPError") -> str:
    """Return what the hub's answer means, and what to do."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code
    match error:
        case GatedRepoError():
            return (
                f"{url} is gated ({status}): accept its terms there, and give a token that may "
                "read it (HF_TOKEN)"
            )
        case RevisionNotFoundError():
            return f"{url} has no revision {shorten(model.revision)} ({status}; @REVISION)"
        case EntryNotFoundError():
            return f"{url} lacks {error.response.request.url} ({status}): it has just changed"
        case RepositoryNotFoundError():
            return (
                f"{model.repository} is no path here, and {url} is no model, or a private one "
                f"({status}): check the name; a private one wants a token (HF_TOKEN)"
            )
    if status == 401:
        return f"{url} refuses the token ({status}): give another (HF_TOKEN), or none"
    told = " ".join((error.server_message or "").split())[:200]
    return f"{url} answers {status}{told and ': '}{told} (HF_TOKEN, HF_ENDPOINT)"


def _broken_off(model: HubModel, url: str, error: Exception) -> str:
    return (
        f"the download of {model} from {url} broke off: {_cause(error)}. Start again: files that "
        "are whole are kept (HF_HUB_DOWNLOAD_TIMEOUT has the seconds of silence that are borne)"
    )


def _refuse_if_full(model: HubModel, num_bytes: int, cache: Path) -> None:
    if num_bytes > _free(cache):
        raise HubError(_lack_of_room(model, num_bytes, cache))


def _lack_of_room(model: HubModel, num_bytes: int, cache: Path) -> str:
    return (
        f"{model} takes {num_bytes / 1e9:.3f} GB more, and the disk of {cache} has "
        f"{_free(cache) / 1e9:.3f} free: make room there, or name another (HF_HOME)"
    )


def _free(cache: Path) -> int:
    existing = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _hf_arguments(model: HubModel) -> str:
    revision = "" if model.revision is None else f" --revision {model.revision}"
    is_whole_name = model.file is not None and _GGUF.fullmatch(model.file)
    return f"{model.repository}{f' {model.file}' if is_whole_name else ''}{revision}"


def _listed(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES_TOLD
    return ", ".join(names[:_MAX_NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")


def _cause(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
