"""Every knob, defined once: a flag of `bitwatt serve` and a BITWATT_* variable of the same name."""

import re
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, NoDecode, SettingsConfigDict

from bitwatt.engine.messages import EngineConfig
from bitwatt.model.config import Dtype, HeadBits, Weights
from bitwatt.telemetry.energy.counter import EnergyChoice
from bitwatt.telemetry.logs import LogFormat
from bitwatt.telemetry.prices import Prices

__all__ = ["ServeSettings"]

_DIGEST_PREFIX = "sha256:"


def _digest_keys(value: Any) -> Any:
    keys = value.split(",") if isinstance(value, str) else value
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("keys are strings")
    return tuple(_digest(key.strip()) for key in keys if key.strip())


def _weights(value: Any) -> Any:
    return "dense" if value == "fp16" else value


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

    path: CliPositionalArg[Path | None] = Field(
        None, description="a model's folder, as on Hugging Face"
    )
    served_model_name: str | None = Field(
        None, min_length=1, max_length=200, description="the model's name, in place of its folder's"
    )
    weights: Annotated[Weights | None, BeforeValidator(_weights)] = Field(
        None,
        description="packed 2-bit weights, which is the default, or dense ones, also named fp16",
    )
    compare: bool | None = Field(
        None, description="serve NAME-fp16 beside it, the same model with 16-bit weights"
    )

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: Annotated[tuple[bytes, ...], NoDecode, BeforeValidator(_digest_keys)] = Field(
        (),
        description="a key callers must have, or sha256:HEX of one; give several with commas",
        repr=False,
    )
    cache_per_key: bool = Field(
        False, description="share no prefix cache between keys, so that none can time another's"
    )
    metrics_public: bool = Field(False, description="serve /metrics without a key")
    max_body_bytes: int = Field(2 * 2**20, ge=1024, le=2**30, description="a request's size")
    body_timeout: float = Field(
        60.0, gt=0, le=3600, description="seconds until a request's body must have come"
    )
    max_open_requests: int = Field(
        1024, ge=1, le=1_000_000, description="requests open at once, being read or answered"
    )
    request_timeout: float = Field(
        600.0, gt=0, le=86_400, description="seconds until a request is given up"
    )
    keep_alive: float = Field(
        10.0, gt=0, le=3600, description="seconds of silence until a stream gets a comment"
    )
    step_timeout: float = Field(
        120.0, gt=0, le=86_400, description="seconds without a step until an engine is restarted"
    )
    drain_timeout: float = Field(
        30.0, ge=0, le=3600, description="seconds open requests have to end after SIGTERM"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="what is logged"
    )
    log_format: LogFormat = Field("text", description="lines of text, or one JSON object a line")

    max_queue: int = Field(256, ge=0, le=100_000, description="requests that may wait")
    max_model_len: int | None = Field(
        None, ge=2, description="tokens of prompt and answer, at most the model's own limit"
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="requests that run at once")
    max_num_batched_tokens: int = Field(512, ge=1, le=2**20, description="tokens of a step")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    backend: str | None = Field(
        None, description="kernels to use, in place of the fastest that run"
    )
    dtype: Dtype = Field("bfloat16", description="of activations and dense weights")
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of an engine, in place of all"
    )
    cpu_isa: str | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="CPU instruction set of the native kernels, in place of the fastest that runs",
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="size of the KV cache, in place of a share of the device's memory"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory to use"
    )
    prefix_caching: bool = Field(True, description="reuse the KV cache of equal prompt starts")
    head_bits: HeadBits = Field(
        16, description="bits of the output head's weights, and of a tied embedding's"
    )
    batch_invariant: bool = Field(
        False, description="make dense answers independent of what else runs"
    )

    shadow_percent: float = Field(
        0.0, ge=0, le=100, description="share of requests mirrored to the other model, compared"
    )

    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="where traces go, as http://localhost:4318/v1/traces",
    )
    energy_source: EnergyChoice = Field(
        "auto", description="what measures joules: the GPU's counter, the CPU's, either, or none"
    )
    usd_per_hour: float | None = Field(
        None, ge=0, le=1e6, description="rent of the GPU or machine that one engine runs on"
    )
    usd_per_kwh: float | None = Field(None, ge=0, le=1e3, description="price of electricity")
    pue: float | None = Field(
        None, ge=1, le=10, description="building's energy over the device's; 1 for the device alone"
    )
    gco2_per_kwh: float | None = Field(
        None, ge=0, le=1e4, description="grams of CO2 the grid emits for a kWh"
    )

    @field_validator("path")
    @classmethod
    def _path_is_a_folder(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError("is not a folder")
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
