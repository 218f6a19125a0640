"""What travels between the API process and an engine process: msgspec structs, never pickles."""

import msgspec

from bitwatt.scheduling.request import FinishReason, ResolvedSampling

__all__ = [
    "MAX_STEPS_AHEAD",
    "Abort",
    "EngineConfig",
    "EngineInfo",
    "EngineMessage",
    "EngineStats",
    "Failed",
    "MemoryUse",
    "Ready",
    "StepOutputs",
    "Submit",
    "ToEngine",
    "TokenLogprobs",
    "TokenOutput",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
]


MAX_STEPS_AHEAD = 32
"""Messages each end keeps while the API process is behind; then the engine waits for it."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, tag="config"):
    """How an engine process is set up; the first message it gets.

    weights    "ternary" serves packed 2-bit weights; "fp16" serves 16-bit weights, dequantized
               where the checkpoint is ternary
    device     "cpu", "cuda", "cuda:N"; "auto" takes a GPU where there is one
    backend    a name of bitwatt_kernels.backend, or None for the fastest that runs; "fake" draws
               meaningless tokens without arithmetic
    kv_cache_bytes  memory of the KV cache; None takes a share of the device's
    """

    model_path: str
    weights: str = "ternary"
    device: str = "auto"
    backend: str | None = None
    dtype: str = "bfloat16"
    batch_invariant: bool = False  # the ternary engine always is
    num_threads: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    prefix_caching: bool = True
    head_bits: int = 16


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """A new request. prompt_token_ids is not empty."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: ResolvedSampling
    priority: int = 0
    cache_salt: str = ""


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End these requests; each unfinished one gets a last output with FinishReason.ABORT."""

    request_ids: list[str]


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position, before temperature and filters.

    top  the most likely tokens, best first; may lack the sampled one
    """

    sampled: float
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one request; the one with a finish_reason is its last.

    logprobs  as many as token_ids where they were asked for, else empty
    error     with FinishReason.ERROR: what happened, fit for the caller
    num_cached_tokens  prompt tokens taken from the prefix cache
    queue_s, prefill_s, decode_s  with the last output: seconds waiting, to the first token, after
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes the engine holds, by kind."""

    packed_weights_bytes: int
    embedding_bytes: int
    other_weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int = 0
    device_total_bytes: int | None = None  # None where the device doesn't tell


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges now and counters since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_cache_queries: int = 0  # tokens
    num_prefix_cache_hits: int = 0  # tokens
    num_steps: int = 0
    step_tokens: int = 0  # of the step just run
    step_s: float = 0.0  # of the step just run
    step_ended_s: float = 0.0  # monotonic, as time_s
    step_prefill: dict[str, int] = {}  # of the step just run: prompt tokens, by request
    time_s: float = 0.0  # when these were true
    busy_s: float = 0.0
    rss_anon_bytes: int | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine that is ready says of itself.

    device_uuid  the GPU's, None on a CPU
    num_linear_parameters, num_layers, attention_width  as telemetry.arithmetic_energy has them
    """

    weights: str
    backend: str
    device: str
    device_name: str
    dtype: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    memory: MemoryUse
    device_uuid: str | None = None
    num_linear_parameters: int = 0
    num_layers: int = 0
    attention_width: int = 0
    notices: list[str] = []  # what an operator should know once, e.g. a backend passed over
    load_s: float = 0.0


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine has loaded its model and takes requests."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot start; it exits after this message."""

    message: str


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs"):
    """What one step brought. Also sent with no outputs, as a heartbeat, when the engine is idle."""

    outputs: list[TokenOutput]
    stats: EngineStats


ToEngine = EngineConfig | Submit | Abort
EngineMessage = Ready | Failed | StepOutputs

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[EngineMessage] = msgspec.msgpack.Decoder(EngineMessage)

encode = _encoder.encode


def decode_to_engine(data: bytes) -> ToEngine:
    """Return the message for the engine; raises msgspec.ValidationError on anything else."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> EngineMessage:
    """Return the engine's message; raises msgspec.ValidationError on anything else."""
    return _from_engine.decode(data)
