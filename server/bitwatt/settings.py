"""The knobs of `bitwatt serve`, each a flag and a BITWATT_* variable of the same name.

Those of the other commands are in commands.py.
"""

import logging
import re
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, NoDecode, SettingsConfigDict

from bitwatt.engine.messages import (
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    MAX_NUM_THREADS,
    EngineConfig,
)
from bitwatt.errors import ConfigurationError
from bitwatt.knobs import Shown
from bitwatt.model.config import Dtype, HeadBits, Weights, WeightsName, weights_named
from bitwatt.model.folder import why_no_folder
from bitwatt.telemetry.energy.counter import EnergyChoice
from bitwatt.telemetry.logs import LogFormat
from bitwatt.telemetry.prices import Prices

__all__ = ["Backend", "ServeSettings"]

Backend = Literal["native", "torch", "triton", "reference", "fake"]

_DIGEST_PREFIX = "sha256:"
_DEFAULT_PORT = 8000

logger = logging.getLogger(__name__)


def _digest_keys(value: Any) -> Any:
    keys = value.split(",") if isinstance(value, str) else value
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("keys are strings")
    digests = tuple(_digest(key.strip()) for key in keys if key.strip())
    if _digest("") in digests or (isinstance(value, str) and not digests):
        raise ValueError("a key is empty, which would let everyone in; give one, or leave it out")
    return digests


def _pass_over_link(value: Any) -> Any:
    """Return the port; Kubernetes sets BITWATT_PORT for every pod beside a Service `bitwatt`."""
    if isinstance(value, str) and value.startswith(("tcp://", "udp://")):
        logger.warning(
            "BITWATT_PORT is %s, as Kubernetes sets it for a Service, and no port; %d is used",
            value,
            _DEFAULT_PORT,
        )
        return _DEFAULT_PORT
    return value


def _split(value: Any) -> Any:
    """Return the parts of a text with commas, in lower case."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip().lower() for part in value.split(",") if part.strip())


def _weights(value: object) -> Weights | None:
    if value is None:
        return None
    try:
        return weights_named(value)
    except ConfigurationError:
        raise ValueError(f"is one of {', '.join(get_args(WeightsName))}") from None


def _digest(key: str) -> bytes:
    if key.startswith(_DIGEST_PREFIX):
        digits = key.removeprefix(_DIGEST_PREFIX)
        if not re.fullmatch("[0-9a-f]{64}", digits):
            raise ValueError(f"{_DIGEST_PREFIX} is followed by 64 hexadecimal digits")
        return bytes.fromhex(digits)
    return sha256(key.encode()).digest()


class ServeSettings(BaseSettings):
    """Serve models with an OpenAI-compatible API.

    Without PATH, the embedded ternary model is served beside its 16-bit twin.
    """

    model_config = SettingsConfigDict(
        env_prefix="BITWATT_",
        cli_prog_name="bitwatt serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        frozen=True,
        extra="forbid",
        validate_default=True,
    )

    path: Annotated[CliPositionalArg[Path | None], Shown("PATH", "the embedded pair")] = Field(
        None, description="A model's folder, as on Hugging Face"
    )
    served_model_name: Annotated[str | None, Shown("NAME", "its folder's name")] = Field(
        None, min_length=1, max_length=200, description="The model's name for callers"
    )
    weights: Annotated[
        Weights | None, BeforeValidator(_weights), Shown("{ternary,dense}", "ternary")
    ] = Field(
        None,
        description="Weights to serve: packed in 2 bits, or dense in the dtype of --dtype; fp16 is "
        "another name for dense",
    )
    compare: Annotated[bool | None, Shown("", "on for the embedded pair, off with a PATH")] = Field(
        None, description="Serve NAME-fp16 beside it, the same model with 16-bit weights"
    )

    host: Annotated[str, Shown("ADDRESS")] = Field(
        "127.0.0.1", description="Address to listen on; 0.0.0.0 for every network"
    )
    port: Annotated[int, BeforeValidator(_pass_over_link), Shown("PORT")] = Field(
        _DEFAULT_PORT, ge=0, le=65535, description="Port to listen on; 0 takes a free one"
    )
    api_key: Annotated[
        tuple[bytes, ...],
        NoDecode,
        BeforeValidator(_digest_keys),
        Shown("KEY[,KEY...]", "none, and everyone is served"),
    ] = Field(
        (),
        description="Keys of which callers must have one; sha256:HEX stands for the key with "
        "that digest",
        repr=False,
    )
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Shown("HOST[,HOST...]", "localhost on a loopback address, any host on another"),
    ] = Field(
        (),
        description="Names that callers may reach the server by, without a port; others get 421. "
        "* is any name; loopback's own are always allowed",
    )
    cors_origins: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Shown("ORIGIN[,ORIGIN...]", "none"),
    ] = Field(
        (),
        description="Origins, as https://example.com, whose pages may call from a browser; "
        "* is any origin",
    )
    cache_per_key: bool = Field(
        False, description="Share no prefix cache between keys, so that none can time another's"
    )
    metrics_public: bool = Field(False, description="Serve /metrics without a key")
    max_body_bytes: Annotated[int, Shown("BYTES")] = Field(
        2 * 2**20, ge=1024, le=2**30, description="Bytes of a request's body; more are answered 413"
    )
    body_timeout: Annotated[float, Shown("SECONDS")] = Field(
        60.0, gt=0, le=3600, description="Seconds that a body may take to come; then 408"
    )
    max_connections: Annotated[int, Shown("CONNECTIONS")] = Field(
        2048,
        ge=1,
        le=1_000_000,
        description="Connections open at once; beyond, the one that has waited for its client for "
        "longest is closed, and where none waits a new one gets 503",
    )
    max_open_requests: Annotated[int, Shown("REQUESTS")] = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="Requests with a body that are read or answered at once; further ones get 503",
    )
    request_timeout: Annotated[float, Shown("SECONDS")] = Field(
        600.0, gt=0, le=86_400, description="Seconds that an answer may take in all; then 504"
    )
    keep_alive: Annotated[float, Shown("SECONDS")] = Field(
        10.0,
        gt=0,
        le=3600,
        description="Seconds without an event after which a stream gets a comment, for proxies "
        "to keep it open",
    )
    step_timeout: Annotated[float, Shown("SECONDS")] = Field(
        120.0,
        gt=0,
        le=86_400,
        description="Seconds of an engine's silence after which it is killed and restarted",
    )
    allow_priority: bool = Field(
        False,
        description="Take priority from callers, each of whom could put its requests before all "
        "others'",
    )
    load_timeout: Annotated[float, Shown("SECONDS")] = Field(
        600.0,
        gt=0,
        le=86_400,
        description="Seconds that an engine may take to load; then it is killed and restarted, and "
        "the server ends if it had never loaded",
    )
    drain_timeout: Annotated[float, Shown("SECONDS")] = Field(
        30.0,
        ge=0,
        le=3600,
        description="Seconds that open requests have to end after SIGTERM, whole ones and 1 at "
        "least",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least grave lines to log"
    )
    log_format: LogFormat = Field(
        "text", description="Log lines as text, or as one JSON object each"
    )

    max_queue: Annotated[int, Shown("REQUESTS")] = Field(
        256,
        ge=0,
        le=100_000,
        description="Requests that wait for a place to run, per model; further ones get 503",
    )
    max_model_len: Annotated[int | None, Shown("TOKENS", "the model's own limit")] = Field(
        None, ge=2, description="Tokens of prompt and answer together, at most the model's limit"
    )
    max_num_seqs: Annotated[int, Shown("REQUESTS")] = Field(
        64, ge=1, le=MAX_NUM_SEQS, description="Requests that run at once, per model"
    )
    max_num_batched_tokens: Annotated[int, Shown("TOKENS")] = Field(
        512,
        ge=1,
        le=MAX_NUM_BATCHED_TOKENS,
        description="Tokens of one step, of all requests together; --max-num-seqs at least. "
        "Longer prompts are computed in pieces",
    )
    device: Annotated[str, Shown("{auto,cpu,cuda,cuda:N}")] = Field(
        "auto", description="Device that computes; auto takes a GPU where there is one"
    )
    backend: Annotated[Backend | None, Shown("", "the fastest that runs")] = Field(
        None,
        description="Kernels: native (C++) or torch on a CPU, triton on a GPU, reference on "
        "either to compare with; fake draws meaningless tokens, to load the server itself",
    )
    dtype: Dtype = Field("bfloat16", description="Type of activations, KV cache and dense weights")
    num_threads: Annotated[int | None, Shown("THREADS", "all processors'")] = Field(
        None, ge=1, le=MAX_NUM_THREADS, description="CPU threads of each engine"
    )
    cpu_isa: Annotated[str | None, Shown("NAME", "the fastest that runs")] = Field(
        None,
        min_length=1,
        max_length=100,
        description="CPU instruction set of the native kernels, as avx2 or avx512_vnni",
    )
    kv_cache_bytes: Annotated[
        int | None,
        Shown("BYTES", "1 GiB on a CPU, on a GPU what --gpu-memory-utilization leaves"),
    ] = Field(
        None, ge=1, description="Bytes of each model's KV cache, never more than all requests need"
    )
    gpu_memory_utilization: Annotated[float, Shown("SHARE")] = Field(
        0.9,
        gt=0,
        le=1,
        description="Share of the GPU's memory for weights, KV cache and a step's activations",
    )
    prefix_caching: bool = Field(
        True,
        description="Reuse of the KV cache among prompts that start alike; --no-prefix-caching "
        "turns it off",
    )
    head_bits: HeadBits = Field(
        16,
        description="Bits of the output head's weights, and of a tied embedding's; 8 is faster "
        "and approximate",
    )
    batch_invariant: bool = Field(
        False,
        description="Make dense answers independent of what else runs, more slowly; ternary ones "
        "always are",
    )

    shadow_percent: Annotated[float, Shown("PERCENT")] = Field(
        0.0,
        ge=0,
        le=100,
        description="Percentage of requests that are also asked of the other model and compared, "
        "unless X-Bitwatt-Shadow says otherwise",
    )

    otlp_endpoint: Annotated[str | None, Shown("URL", "no traces")] = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Where traces go by OTLP over HTTP, as http://localhost:4318/v1/traces",
    )
    energy_source: EnergyChoice = Field(
        "auto",
        description="What measures joules: the GPU's counter (nvml), the CPU's (rapl), the one of "
        "the engine's device (auto), or nothing",
    )
    usd_per_hour: Annotated[float | None, Shown("USD", "unknown, and so is the cost")] = Field(
        None,
        ge=0,
        le=1e6,
        description="Rent an hour of the GPU or machine that one engine runs on",
    )
    usd_per_kwh: Annotated[float | None, Shown("USD", "unknown, and so is the cost")] = Field(
        None, ge=0, le=1e3, description="Price of a kilowatt-hour"
    )
    pue: Annotated[float | None, Shown("RATIO", "unknown, and so is its cost")] = Field(
        None,
        ge=1,
        le=10,
        description="The building's energy over the device's; 1 counts the device's alone",
    )
    gco2_per_kwh: Annotated[float | None, Shown("GRAMS", "unknown, and so is the CO2")] = Field(
        None, ge=0, le=1e4, description="Grams of CO2 that the grid emits for a kilowatt-hour"
    )

    @field_validator("path")
    @classmethod
    def _path_is_a_folder(cls, path: Path | None) -> Path | None:
        reason = None if path is None else why_no_folder(path)
        if reason is not None:
            raise ValueError(reason)
        return path

    @model_validator(mode="after")
    def _names_one_thing(self) -> "ServeSettings":
        if self.path is None and (self.weights or self.served_model_name):
            raise ValueError("--weights and --served-model-name need a PATH")
        if self.compare and self.weights == "dense":
            raise ValueError("--compare serves both weights; drop --weights dense")
        is_pair = self.compare if self.path is not None else self.compare is not False
        if self.shadow_percent and not is_pair:
            raise ValueError("--shadow-percent mirrors to a second model; add --compare")
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def prices(self) -> Prices:
        """What the operator pays, where they said so."""
        return Prices(
            usd_per_hour=self.usd_per_hour,
            usd_per_kwh=self.usd_per_kwh,
            pue=self.pue,
            gco2_per_kwh=self.gco2_per_kwh,
        )

    def engine_config(self, model_path: Path, weights: Weights) -> EngineConfig:
        """Return the setting-up of an engine for this model folder."""
        return EngineConfig(
            model_path=str(model_path),
            weights=weights,
            device=self.device,
            backend=self.backend,
            dtype=self.dtype,
            batch_invariant=self.batch_invariant,
            num_threads=self.num_threads,
            cpu_isa=self.cpu_isa,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_bytes=self.kv_cache_bytes,
            gpu_memory_utilization=self.gpu_memory_utilization,
            prefix_caching=self.prefix_caching,
            head_bits=self.head_bits,
        )
