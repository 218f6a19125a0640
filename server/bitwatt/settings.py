"""The knobs of `bitwatt serve`, each a flag and a BITWATT_* variable of the same name.

Those of the other commands are in commands.py.
"""

import logging
import re
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator
from pydantic_settings import CliPositionalArg, NoDecode, SettingsConfigDict

from bitwatt.addresses import checked_hosts, checked_origins, checked_url
from bitwatt.engine.messages import (
    MAX_NUM_BATCHED_TOKENS,
    MAX_NUM_SEQS,
    MAX_NUM_THREADS,
    EngineConfig,
)
from bitwatt.errors import ConfigurationError
from bitwatt.hub import named
from bitwatt.knobs import Settings, Shown
from bitwatt.model.config import (
    Dtype,
    HeadBits,
    KVCacheDtype,
    Weights,
    WeightsName,
    weights_named,
)
from bitwatt.model.folder import why_no_folder
from bitwatt.quantities import read_bytes, read_count
from bitwatt.scheduling.drafting import Speculation
from bitwatt.serving.sampling_params import GenerationConfig
from bitwatt.telemetry.energy.counter import EnergyChoice
from bitwatt.telemetry.logs import LogFormat
from bitwatt.telemetry.prices import Prices
from bitwatt.text.answers.formats import ReasoningParser, ToolCallParser

__all__ = ["Backend", "ServeSettings", "check_source"]

Backend = Literal["native", "torch", "triton", "reference", "fake"]

_DIGEST_PREFIX = "sha256:"
_DEFAULT_PORT = 8000
_MAX_KEY_FILE_BYTES = 2**20
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")
# Words that users of vLLM know; auto is bfloat16, in which checkpoints of ternary models come.
_OTHER_DTYPES = {"auto": "bfloat16", "half": "float16", "float": "float32"}

logger = logging.getLogger(__name__)


def check_source(value: Any) -> Any:
    """Return what names a model as a text: a folder that is there, or a name of the hub.

    Raises  ValueError for a path without a folder
    """
    if isinstance(value, Path):
        value = str(value.absolute())
    source = named(value) if isinstance(value, str) else None
    reason = why_no_folder(source) if isinstance(source, Path) else None
    if reason is not None:
        raise ValueError(reason)
    return value


def _digest_keys(value: Any) -> Any:
    keys = value.split(",") if isinstance(value, str) else value
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("keys are strings")
    digests = tuple(_digest(key.strip()) for key in keys if key.strip())
    if _digest("") in digests or (isinstance(value, str) and not digests):
        raise ValueError("a key is empty, which would let everyone in; give one, or leave it out")
    return digests


def _read_keys(value: Any) -> Any:
    if not isinstance(value, str | Path):
        return value
    return _digest_keys(",".join(_text_of(value).splitlines()))


def _text_of(path: str | Path) -> str:
    """Return what a file of keys holds."""
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_KEY_FILE_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    if len(text) > _MAX_KEY_FILE_BYTES:
        raise ValueError(f"has more than {_MAX_KEY_FILE_BYTES} bytes")
    return text


def _read_key(value: Any) -> Any:
    """Return the first key of a file that is written out."""
    if not isinstance(value, str | Path):
        return value
    lines = (line.strip() for line in _text_of(value).splitlines())
    key = next((line for line in lines if line and not line.startswith(_DIGEST_PREFIX)), None)
    if key is None:
        raise ValueError(f"has no key; a digest ({_DIGEST_PREFIX}) opens nothing")
    return key


def _pass_over_link(value: Any) -> Any:
    """Return the port; Kubernetes sets BITWATT_PORT for every pod beside a Service `bitwatt`."""
    if isinstance(value, str) and value.startswith(("tcp://", "udp://", "sctp://")):
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


def _url(value: str | None) -> str | None:
    return None if value is None else checked_url(value)


def _server(value: str | None) -> str | None:
    """Return the address of a server, which is told apart by nothing behind it."""
    if value is not None and re.search("[@?#]", checked_url(value)):
        raise ValueError("is no server's address: it has an @, ? or #; write http://host:port")
    return value


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


def _dtype(value: Any) -> Any:
    return _OTHER_DTYPES.get(value, value) if isinstance(value, str) else value


def _model_len(value: Any) -> Any:
    return None if value in ("auto", "-1", -1) else read_count(value)


class ServeSettings(Settings):
    """Serve models with an OpenAI-compatible API.

    Without PATH, the embedded ternary model is served beside its 16-bit twin.
    """

    model_config = SettingsConfigDict(
        env_prefix="BITWATT_",
        cli_prog_name="bitwatt serve",
        validate_default=True,
    )
    groups: ClassVar[dict[str, str]] = {
        "path": "What is served",
        "host": "Address and callers",
        "max_body_bytes": "Limits of connections and requests",
        "load_timeout": "Supervision and logs",
        "max_model_len": "Engine",
        "energy_source": "Energy and prices",
    }
    never_empty = ("api_key", "api_key_file")  # an empty key would let everyone in

    path: Annotated[
        CliPositionalArg[str | None],
        BeforeValidator(check_source),
        Shown("PATH", "the embedded pair"),
    ] = Field(
        None,
        description="A model's folder, as on Hugging Face, or a .gguf file; or "
        "ORG/NAME[:FILE][@REVISION] of its hub, where there is no such path: a GGUF's FILE, a "
        "branch, tag or commit",
    )
    served_model_name: Annotated[str | None, Shown("NAME", "its folder's, or ORG/NAME")] = Field(
        None, min_length=1, max_length=200, description="The model's name for callers"
    )
    weights: Annotated[
        Weights | None, BeforeValidator(_weights), Shown("{ternary,dense}", "ternary")
    ] = Field(
        None,
        description="Weights to serve: packed in 2 bits, or dense in the dtype of --dtype; fp16 is "
        "another name for dense",
    )
    quantize: bool = Field(
        False,
        description="Ternarize a PATH that was not trained as a ternary model, by BitNet b1.58's "
        "rule: it answers worse, mostly without sense, and the server says so wherever it is named",
    )
    compare: Annotated[bool | None, Shown("", "on for the embedded pair, off with a PATH")] = Field(
        None, description="Serve NAME-fp16 beside it, the same model with 16-bit weights"
    )
    twin: Annotated[str | None, BeforeValidator(check_source), Shown("PATH", "none")] = Field(
        None,
        description="Another model to serve dense beside it as NAME-twin, the quality twin, with "
        "its own tokenizer and chat template; named in the same way as PATH",
    )
    twin_url: Annotated[str | None, AfterValidator(_server), Shown("URL", "none")] = Field(
        None,
        description="Other bitwatt server, which has the twin, as http://baseline:8000; the page, "
        "/bitwatt/v1/comparison and mirrors take it for this one's own",
    )
    twin_key_file: Annotated[str | None, BeforeValidator(_read_key), Shown("FILE", "none")] = Field(
        None, description="File whose first key, one a line, that server takes", repr=False
    )
    first_measurement: bool = Field(
        True,
        description="Have the page measure by itself when it is first opened: once, at idle, for "
        "a few seconds",
    )
    shadow_percent: Annotated[float, Shown("PERCENT")] = Field(
        0.0,
        ge=0,
        le=100,
        description="Percentage of requests that are also asked of the other model, when nobody "
        "calls a model on its device, and compared, unless X-Bitwatt-Shadow says otherwise",
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
        "that digest. Everyone on the machine can read a flag: use the variable or --api-key-file",
        repr=False,
    )
    api_key_file: Annotated[
        tuple[bytes, ...], NoDecode, BeforeValidator(_read_keys), Shown("FILE", "none")
    ] = Field((), description="File with more such keys, one a line", repr=False)
    allowed_hosts: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        AfterValidator(checked_hosts),
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
        AfterValidator(checked_origins),
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
    allow_priority: bool = Field(
        False,
        description="Take priority from callers, each of whom could put its requests before all "
        "others'",
    )
    allow_control_tokens: bool = Field(
        False,
        description="Take control tokens in callers' messages as such, so that whoever writes a "
        "message can write turns of the model and the system, too",
    )
    tool_call_parser: ToolCallParser = Field(
        "auto",
        description="How the models write tool calls, by vLLM's names; auto reads it from their "
        "chat templates",
    )
    reasoning_parser: ReasoningParser = Field(
        "auto",
        description="How the models write their thinking: think is between <think> and </think>; "
        "auto reads it from their chat templates; none leaves it in the content",
    )
    generation_config: GenerationConfig = Field(
        "auto",
        description="Where a request is silent on temperature, top_p, top_k, min_p or "
        "repetition_penalty: what the model's generation_config.json or GGUF metadata recommends, "
        "or none of it",
    )
    strict_fields: bool = Field(
        False,
        description="Refuse fields that no API known here defines with 400, in place of passing "
        "over them and naming them in X-Bitwatt-Ignored-Fields",
    )
    kept_items_bytes: Annotated[int, BeforeValidator(read_bytes), Shown("BYTES")] = Field(
        4 * 2**20,
        ge=0,
        le=2**30,
        description="Bytes of the latest items of /v1/responses that are kept in memory for each "
        "key, for later inputs that refer to them; those of requests with store: false aren't",
    )
    max_body_bytes: Annotated[int, BeforeValidator(read_bytes), Shown("BYTES")] = Field(
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
    max_open_requests_per_key: Annotated[int | None, Shown("REQUESTS", "no limit")] = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Those of one key; its further ones get 429",
    )
    tokens_per_minute_per_key: Annotated[
        int | None, BeforeValidator(read_count), Shown("TOKENS", "no limit")
    ] = Field(
        None,
        ge=1,
        le=1_000_000_000,
        description="Tokens of prompts and answers that one key has a minute; when they are used "
        "up, what runs goes on and further requests get 429",
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
    max_queue: Annotated[int, Shown("REQUESTS")] = Field(
        256,
        ge=0,
        le=100_000,
        description="Requests that wait for a place to run, per model; further ones get 503",
    )
    load_timeout: Annotated[float, Shown("SECONDS")] = Field(
        600.0,
        gt=0,
        le=86_400,
        description="Seconds that an engine may take to load; then it is killed and restarted, and "
        "the server ends if it had never loaded",
    )
    step_timeout: Annotated[float, Shown("SECONDS")] = Field(
        120.0,
        gt=0,
        le=86_400,
        description="Seconds of an engine's silence after which it is killed and restarted",
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
    otlp_endpoint: Annotated[str | None, AfterValidator(_url), Shown("URL", "no traces")] = Field(
        None,
        description="Where traces go by OTLP over HTTP, as http://localhost:4318/v1/traces, whose "
        "path is taken where none is given",
    )

    max_model_len: Annotated[
        int | None, BeforeValidator(_model_len), Shown("TOKENS", "the model's own limit")
    ] = Field(
        None, ge=2, description="Tokens of prompt and answer together, at most the model's limit"
    )
    max_num_seqs: Annotated[int, Shown("REQUESTS")] = Field(
        64, ge=1, le=MAX_NUM_SEQS, description="Requests that run at once, per model"
    )
    max_num_batched_tokens: Annotated[
        int | None,
        BeforeValidator(read_count),
        Shown("TOKENS", "512, on a GPU 2048; --max-num-seqs where that is more"),
    ] = Field(
        None,
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
    dtype: Annotated[Dtype, BeforeValidator(_dtype)] = Field(
        "bfloat16", description="Type of activations and dense weights"
    )
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
        BeforeValidator(read_bytes),
        Shown("BYTES", "1GiB on a CPU, on a GPU what --gpu-memory-utilization leaves"),
    ] = Field(
        None, ge=1, description="Bytes of each model's KV cache, never more than all requests need"
    )
    kv_cache_dtype: KVCacheDtype = Field(
        "auto",
        description="Type of keys and values in the KV cache; auto takes --dtype's. int8 takes "
        "about half the memory of 16 bits, and is approximate. triton takes these two alone",
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
    speculate: Speculation = Field(
        "off",
        description="What drafts tokens that one step then verifies: ngram looks them up in a "
        "request's own prompt and answer, where they repeat. Ternary answers are the same without",
    )
    head_bits: HeadBits = Field(
        16,
        description="Bits of the output head's weights, and of a tied embedding's; 8 is faster "
        "and approximate. Ternary ones stay so",
    )
    batch_invariant: bool = Field(
        False,
        description="Make dense answers independent of what else runs also on a GPU or by AMX, "
        "more slowly; ternary ones always are",
    )
    persistent_step: bool = Field(
        False,
        description="Run all ternary layers of a step that decodes up to 8 tokens in one kernel, "
        "on an NVIDIA GPU: an experiment that no card has run yet. Other steps are as without",
    )

    energy_source: EnergyChoice = Field(
        "auto",
        description="What measures joules: the GPU's counter (nvml, AMD's amdsmi), the CPU's "
        "(rapl), the one of the engine's device (auto), or nothing",
    )
    energy_fields: bool = Field(
        False,
        description="Give every answer its energy and cost in other servers' forms, too, unless "
        "X-Bitwatt-Energy says otherwise",
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

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, device: str) -> str:
        if not _DEVICE.fullmatch(device):
            raise ValueError("is one of auto, cpu, cuda and cuda:N")
        return device

    @model_validator(mode="after")
    def _names_one_thing(self) -> "ServeSettings":
        if self.path is None and (self.weights or self.served_model_name or self.quantize):
            raise ValueError("--weights, --served-model-name and --quantize need a PATH")
        if self.compare and self.weights == "dense":
            raise ValueError("--compare serves both weights; drop --weights dense")
        twins = {"--compare": self.compare, "--twin": self.twin, "--twin-url": self.twin_url}
        given = [flag for flag, value in twins.items() if value]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} give {len(given)} twins; keep one")
        limits_keys = self.max_open_requests_per_key or self.tokens_per_minute_per_key
        if limits_keys and not self.key_digests:
            raise ValueError(
                "--max-open-requests-per-key and --tokens-per-minute-per-key need keys; add "
                "--api-key-file"
            )
        if self.twin_key_file and not self.twin_url:
            raise ValueError("--twin-key-file needs --twin-url")
        if self.shadow_percent and not (self.serves_pair or self.twin_url):
            raise ValueError(
                "--shadow-percent mirrors to a second model; add --compare, --twin or --twin-url"
            )
        return self

    @property
    def serves_pair(self) -> bool:
        """Whether this server has both models."""
        if self.twin is not None:
            return True
        if self.compare is None:
            return self.path is None and self.twin_url is None
        return self.compare

    @property
    def is_loopback(self) -> bool:
        """Whether only programs of this machine reach the server."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def key_digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each key that callers may have; none lets everyone in."""
        return self.api_key + self.api_key_file

    @property
    def prices(self) -> Prices:
        """What the operator pays, where they said so."""
        return Prices(
            usd_per_hour=self.usd_per_hour,
            usd_per_kwh=self.usd_per_kwh,
            pue=self.pue,
            gco2_per_kwh=self.gco2_per_kwh,
        )

    def engine_config(
        self, model_path: Path, weights: Weights, *, quantize: bool = False
    ) -> EngineConfig:
        """Return the setting-up of an engine for this model folder."""
        return EngineConfig(
            model_path=str(model_path),
            weights=weights,
            device=self.device,
            backend=self.backend,
            dtype=self.dtype,
            batch_invariant=self.batch_invariant,
            persistent_step=self.persistent_step,
            num_threads=self.num_threads,
            cpu_isa=self.cpu_isa,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_bytes=self.kv_cache_bytes,
            kv_cache_dtype=self.kv_cache_dtype,
            gpu_memory_utilization=self.gpu_memory_utilization,
            num_engines_per_gpu=2 if self.serves_pair else 1,
            prefix_caching=self.prefix_caching,
            speculate=self.speculate,
            head_bits=self.head_bits,
            quantize=quantize,
        )
