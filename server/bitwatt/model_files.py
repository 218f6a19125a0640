"""The commands on models' files: `bitwatt inspect` and `bitwatt convert`."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from bitwatt.checkpoints.gguf_file import is_gguf
from bitwatt.engine.messages import MAX_NUM_SEQS
from bitwatt.errors import BitwattError
from bitwatt.hub import fetch
from bitwatt.knobs import Settings, Shown
from bitwatt.model.config import Dtype, HeadBits, KVCacheDtype
from bitwatt.quantities import read_bytes, read_count
from bitwatt.settings import check_source

__all__ = ["ConvertSettings", "InspectSettings", "run_convert", "run_inspect"]

_INTERRUPTED = 130  # 128 and SIGINT's number, as shells have it


class InspectSettings(Settings):
    """Say what a model's files hold, what is wrong with them, and what serving them will take.

    Every tensor is read. The tables are printed as Markdown; the status is 1 where the model
    can't be served.
    """

    model_config = SettingsConfigDict(
        env_prefix="BITWATT_INSPECT_", cli_prog_name="bitwatt inspect"
    )

    groups: ClassVar[dict[str, str]] = {
        "quantize": "What would be served",
        "json_path": "Output",
    }

    path: Annotated[CliPositionalArg[str], BeforeValidator(check_source), Shown("PATH")] = Field(
        description="A model's folder, as on Hugging Face, or a .gguf file; or "
        "ORG/NAME[:FILE][@REVISION] of its hub, where there is no such path",
    )
    quantize: bool = Field(
        False, description="What it is once a model that isn't ternary is ternarized"
    )
    max_num_seqs: Annotated[int, Shown("REQUESTS")] = Field(
        64, ge=1, le=MAX_NUM_SEQS, description="Requests that run at once"
    )
    max_model_len: Annotated[
        int | None, BeforeValidator(read_count), Shown("TOKENS", "the model's own limit")
    ] = Field(None, ge=2, description="Tokens of prompt and answer together")
    kv_cache_bytes: Annotated[
        int | None,
        BeforeValidator(read_bytes),
        Shown("BYTES", "1GiB on a CPU, on a GPU what all requests need"),
    ] = Field(None, ge=1, description="Bytes of the KV cache, never more than all requests need")
    kv_cache_dtype: KVCacheDtype = Field(
        "auto", description="Type of keys and values in the KV cache; auto takes --dtype's"
    )
    dtype: Dtype = Field("bfloat16", description="Type of activations and dense weights")
    head_bits: HeadBits = Field(
        16, description="Bits of the output head's weights, and of a tied embedding's"
    )
    json_path: Annotated[Path | None, Shown("FILE")] = Field(
        None, alias="json", description="File to write all figures to, as JSON"
    )


def run_inspect(settings: InspectSettings) -> int:
    """Print the tables, write what was asked for; return the exit status."""
    from bitwatt.inspection import as_markdown, inspect

    try:
        found = inspect(
            fetch(settings.path),
            quantize=settings.quantize,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=max(512, settings.max_num_seqs),
            max_model_len=settings.max_model_len,
            kv_cache_bytes=settings.kv_cache_bytes,
            kv_cache_dtype=settings.kv_cache_dtype,
            dtype=settings.dtype,
            head_bits=settings.head_bits,
        )
        print(as_markdown(found), end="")
        if settings.json_path is not None:
            settings.json_path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except (BitwattError, OSError) as error:
        print(f"bitwatt inspect: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 1 if found["refused"] else 0


class ConvertSettings(Settings):
    """Write a model as a new Hugging Face folder or GGUF file."""

    model_config = SettingsConfigDict(
        env_prefix="BITWATT_CONVERT_", cli_prog_name="bitwatt convert"
    )

    path: Annotated[CliPositionalArg[str], BeforeValidator(check_source), Shown("PATH")] = Field(
        description="A model's folder, as on Hugging Face, or a .gguf file; or "
        "ORG/NAME[:FILE][@REVISION] of its hub, where there is no such path",
    )
    destination: Annotated[CliPositionalArg[Path], Shown("DESTINATION")] = Field(
        description="Folder, or .gguf file, to write, which is not there yet"
    )
    quantize: bool = Field(
        False, description="Ternarize a model that was not trained as a ternary one, at a loss"
    )
    to: Literal["hf", "bf16", "gguf-tq2_0", "gguf-q2_0"] = Field(
        description="Form to write: hf packs ternary linears four weights a byte, with a scale a "
        "matrix, and keeps everything else; bf16 makes every matrix one of bfloat16, as --weights "
        "dense does; gguf-tq2_0 and gguf-q2_0 write a file for llama.cpp, with a float16 scale to "
        "256 or 64 weights"
    )


def run_convert(settings: ConvertSettings) -> int:
    """Convert, say what was written; return the exit status."""
    from bitwatt.checkpoints.conversion import convert, convert_to_gguf
    from bitwatt.text.gguf_tokenizer import write_gguf_text
    from bitwatt.text.gguf_vocabulary import check_gguf_text, gguf_text

    notices: list[str] = []
    try:
        source = fetch(settings.path)
        if settings.to == "hf" or settings.to == "bf16":  # as mypy narrows
            write_texts = partial(write_gguf_text, source) if is_gguf(source) else None
            num_bytes = convert(
                source,
                settings.destination,
                settings.to,
                write_texts,
                quantize=settings.quantize,
            )
        else:
            written = convert_to_gguf(
                source,
                settings.destination,
                settings.to,
                texts=partial(gguf_text, source),
                check_texts=partial(check_gguf_text, source),
                quantize=settings.quantize,
            )
            num_bytes, notices = written.num_bytes, written.notices
    except (BitwattError, OSError) as error:
        print(f"bitwatt convert: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    for notice in notices:
        print(f"bitwatt convert: {notice}", file=sys.stderr)
    print(f"{settings.destination}: {num_bytes / 1e6:.1f} MB of tensors")
    return 0
