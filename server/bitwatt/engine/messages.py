"""What travels between the API process and an engine process: msgspec structs, never pickles."""

import re
from collections.abc import Callable, Sequence
from typing import get_args

import msgspec

from bitwatt.constraints.compiling import TokenBytes
from bitwatt.errors import ConfigurationError, shorten
from bitwatt.model.config import Dtype, HeadBits, KVCacheDtype, Weights, weights_named
from bitwatt.model.runner_protocol import PromptLogprobs
from bitwatt.scheduling.drafting import Speculation
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
    "PromptLogprobs",
    "Ready",
    "StepOutputs",
    "Submit",
    "ToEngine",
    "TokenBytes",
    "TokenLogprobs",
    "TokenOutput",
    "decode_from_engine",
    "decode_to_engine",
    "encode",
    "merged",
]


MAX_STEPS_AHEAD = 32
"""Steps' messages each end of the socket keeps for an API process that is behind; then the engine
waits."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, tag="config"):
    """How an engine process is set up; the first message it gets.

    model_path  a model's folder
    weights     "ternary" serves packed 2-bit weights; "dense", or "fp16", serves them in dtype,
                dequantized where the checkpoint is ternary
    device      "cpu", "cuda" or "cuda:N"; "auto" takes a GPU where there is one
    backend     a name of bitwatt_kernels.registry, or None for the fastest that runs; "fake" draws
                meaningless tokens without arithmetic
    dtype       of activations and of dense weights
    batch_invariant  whether dense answers too are independent of what else runs; ternary ones
                always are
    persistent_step  whether a step that decodes up to 8 tokens runs all ternary layers in one
                kernel, on an NVIDIA GPU
    num_threads     CPU threads of the backend and of torch; None takes all the process may use
    cpu_isa     instruction set of the native backend, which then is the only candidate; None takes
                the fastest that runs
    max_model_len   tokens of prompt and answer; None takes the model's own limit
    max_num_seqs    requests that run at once
    max_num_batched_tokens  tokens of a step, at least max_num_seqs; None takes 512, and 2048 on a
                GPU, or max_num_seqs where it is more
    kv_cache_bytes  memory of the KV cache, of which no more is taken than max_num_seqs requests
                can fill; None takes what gpu_memory_utilization leaves, and on a CPU 1 GiB
    kv_cache_dtype  of keys and values; auto is dtype, int8 has a scale to each head of a token
    gpu_memory_utilization  share of a GPU's memory to use, above 0, at most 1
    num_engines_per_gpu  that share the GPU, each a like part of gpu_memory_utilization
    prefix_caching  whether prompts share the KV cache of equal beginnings
    speculate   what drafts tokens that a step then verifies: ngram looks them up in prompt and
                answer
    head_bits   of the output head's weights, and of a tied embedding's: 16, which stands for
                dtype, or 8
    quantize    ternarizes a checkpoint whose linears are dense, for either weights
    Raises      ConfigurationError, which names the value, what is accepted and the knob
    """

    model_path: str
    weights: Weights = "ternary"
    device: str = "auto"
    backend: str | None = None
    dtype: Dtype = "bfloat16"
    batch_invariant: bool = False
    persistent_step: bool = False
    num_threads: int | None = None
    cpu_isa: str | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_dtype: KVCacheDtype = "auto"
    gpu_memory_utilization: float = 0.9
    num_engines_per_gpu: int = 1
    prefix_caching: bool = True
    speculate: Speculation = "off"
    head_bits: HeadBits = 16
    quantize: bool = False

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "weights", weights_named(self.weights))
        for name, (accepted, is_accepted) in _ACCEPTED.items():
            value = getattr(self, name)
            if not is_accepted(value):
                raise ConfigurationError(
                    f"{name} is {shorten(value)}; it must be {accepted} "
                    f"(--{name.replace('_', '-')})"
                )

    def tokens_a_step(self, *, on_gpu: bool = False) -> int:
        """Return max_num_batched_tokens, or what stands for None."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return max(2048 if on_gpu else 512, self.max_num_seqs)


MAX_NUM_THREADS = 1024
MAX_NUM_SEQS = 4096
MAX_NUM_BATCHED_TOKENS = 1 << 20

_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")


def _count(lowest: int, highest: int | None = None, *, is_optional: bool = False) -> "_Accepted":
    """Return the whole numbers from lowest to highest, None besides where it is optional."""
    limit = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"

    def is_accepted(value: object) -> bool:
        if value is None:
            return is_optional
        is_below = highest is None or (type(value) is int and value <= highest)
        return type(value) is int and value >= lowest and is_below

    return f"a whole number {limit}" + (", or None" if is_optional else ""), is_accepted


_Accepted = tuple[str, Callable[[object], bool]]


# What EngineConfig's fields may be, in words and as a test.
_ACCEPTED: dict[str, _Accepted] = {
    "model_path": ("text", lambda value: isinstance(value, str)),
    "device": (
        "auto, cpu, cuda or cuda:N",
        lambda value: isinstance(value, str) and _DEVICE.fullmatch(value) is not None,
    ),
    "backend": ("text or None", lambda value: value is None or isinstance(value, str)),
    "dtype": (f"one of {', '.join(get_args(Dtype))}", lambda value: value in get_args(Dtype)),
    "batch_invariant": ("True or False", lambda value: isinstance(value, bool)),
    "persistent_step": ("True or False", lambda value: isinstance(value, bool)),
    "num_threads": _count(1, MAX_NUM_THREADS, is_optional=True),
    "cpu_isa": (
        "text or None",
        lambda value: value is None or (isinstance(value, str) and value != ""),
    ),
    "max_model_len": _count(2, is_optional=True),
    "max_num_seqs": _count(1, MAX_NUM_SEQS),
    "max_num_batched_tokens": _count(1, MAX_NUM_BATCHED_TOKENS, is_optional=True),
    "kv_cache_bytes": _count(1, is_optional=True),
    "kv_cache_dtype": (
        f"one of {', '.join(get_args(KVCacheDtype))}",
        lambda value: value in get_args(KVCacheDtype),
    ),
    "gpu_memory_utilization": (
        "a number above 0, at most 1",
        lambda value: (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
        ),
    ),
    "num_engines_per_gpu": _count(1, 16),
    "prefix_caching": ("True or False", lambda value: isinstance(value, bool)),
    "speculate": ("ngram or off", lambda value: value in get_args(Speculation)),
    "quantize": ("True or False", lambda value: isinstance(value, bool)),
    "head_bits": ("8 or 16", lambda value: type(value) is int and value in get_args(HeadBits)),
}


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag="submit"):
    """A new request.

    request_id        unique among those that run or wait
    prompt_token_ids  at least one
    priority          lower runs first; equal ones in the order they came
    cache_salt        prompts share the prefix cache where it is equal
    sent_s            monotonic seconds of when it was sent, and so waits from; None: when it comes

    The first one with a grammar comes behind the model's TokenBytes.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: ResolvedSampling
    priority: int = 0
    cache_salt: str = ""
    sent_s: float | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End these requests; each unfinished one gets a last output with FinishReason.ABORT."""

    request_ids: list[str]


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position, before temperature and filters.

    top  the most likely tokens, best first; may lack the sampled one
    """

    sampled: float
    top: list[tuple[int, float]]


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request; the one with a finish_reason is its last.

    logprobs  as many as token_ids where they were asked for, else empty
    prompt_logprobs  with the first output where they were asked for: of all the prompt's tokens but
              the first; None for a prompt of one token
    embedding  with the last output where it was asked for: hidden_size float32 of length 1, in the
              machine's own byte order
    error     with FinishReason.ERROR: what happened, fit for the caller
    num_cached_tokens  prompt tokens taken from the prefix cache
    num_preemptions    with the first token and with the last output: how often the request was put
                       back to wait
    queue_s, prefill_s  with the first token and with the last output: seconds waiting, and then to
                       the first token
    decode_s           with the last output: seconds after the first token
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: PromptLogprobs | None = None
    embedding: bytes | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


def merged(outputs: Sequence[TokenOutput]) -> TokenOutput:
    """Return outputs of one request, in order, as one: all their tokens, the last one's end."""
    first, last = outputs[0], outputs[-1]
    if first is last:
        return first
    is_end = last.finish_reason is not None
    return msgspec.structs.replace(
        last,
        num_preemptions=last.num_preemptions if is_end else first.num_preemptions,
        queue_s=last.queue_s if is_end else first.queue_s,
        prefill_s=last.prefill_s if is_end else first.prefill_s,
        token_ids=[token_id for output in outputs for token_id in output.token_ids],
        logprobs=[entry for output in outputs for entry in output.logprobs],
        prompt_logprobs=first.prompt_logprobs,
    )


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes the engine holds on its device, by kind.

    packed_weights_bytes  ternary linears as their backend reads them; 0 where they are dense
    embedding_bytes       embedding and head; a head that shares the embedding's matrix adds none
    other_weights_bytes   norms, the rotary table, and dense linears
    kv_cache_bytes        all its blocks, used or not
    device_total_bytes    the GPU's memory; None on a CPU
    """

    packed_weights_bytes: int
    embedding_bytes: int
    other_weights_bytes: int
    kv_cache_bytes: int
    device_total_bytes: int | None = None  # None where the device doesn't tell


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges now and counters since the engine started. Times are monotonic seconds.

    num_running, num_waiting     requests that hold a row, and those that wait for one
    num_blocks_used, num_blocks  of the KV cache; a block that only the prefix cache keeps is free
    num_prompt_tokens, num_cached_prompt_tokens  of the requests whose first token was drawn, and
                           those of them found in the prefix cache
    num_generation_tokens  drawn
    num_preemptions        requests put back to wait because the KV cache was full
    num_prefix_cache_queries, num_prefix_cache_hits  prompt tokens looked up, and those found, of
                           the requests that began to run
    num_drafts             times that drafts of a request were verified
    num_draft_tokens, num_accepted_tokens  tokens drafted, and those of them that were drawn as well
    num_steps              done
    step_tokens, step_s    tokens of the step just done, and the seconds it took
    step_ended_s           when it ended
    step_prefill           tokens it prefilled, by request id; requests that decoded left out
    step_drafts            drafts that it verified, by request id
    time_s                 when all this was true
    busy_s                 seconds spent in steps
    rss_anon_bytes         the process's own memory; None where the system doesn't tell
    read_bytes_per_s       of the device's memory; None where it isn't measured, or not yet
    """

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_prefix_cache_queries: int = 0
    num_prefix_cache_hits: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_steps: int = 0
    step_tokens: int = 0
    step_s: float = 0.0
    step_ended_s: float = 0.0
    step_prefill: dict[str, int] = {}
    step_drafts: dict[str, int] = {}
    time_s: float = 0.0
    busy_s: float = 0.0
    rss_anon_bytes: int | None = None
    read_bytes_per_s: float | None = None


class Roofline(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds decoding: a step reads at least its weights, as fast as memory gives them.

    step_bytes   of weights that a decode step reads, whatever its batch
    unavailable  why decoding can't be held against memory's rate (EngineStats); else None
    """

    step_bytes: int
    unavailable: str | None = None


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine that is ready says of itself.

    weights        as in EngineConfig
    backend        the one that runs
    device         as torch names it, such as "cuda:0"; "none" for the fake backend
    device_name    the GPU's product name, or the CPU's, where the system tells it
    num_threads    of the CPU that compute; None on a GPU
    instruction_set  that the kernels were built for; None where they don't choose one
    dtype          as in EngineConfig; "none" for the fake backend
    kv_cache_dtype  likewise, where auto is dtype
    num_parameters  of the whole model, a tied embedding counted once
    vocab_size     rows of the head
    max_model_len  tokens of prompt and answer
    eos_token_ids  any of them ends a sequence
    num_blocks, block_size  of the KV cache: blocks, and tokens a block
    max_num_seqs   requests that run at once
    memory         what the engine holds
    linear_bytes   of its memory, the layers' matrices, ternary or dense; None for the fake backend
    device_uuid    the GPU's, as NVML has it without "GPU-"; None on a CPU
    num_linear_parameters, num_layers, attention_width  as telemetry.energy.arithmetic has them; 0
                   for the fake backend
    hidden_size    numbers of an embedding
    notices        what an operator should act on, such as a backend that was passed over
    fallback       where a slower backend runs than could: which, and what to do; else None
    load_s         seconds that building the engine took
    quantized      where ternary weights were made of dense ones: what that means; else None
    roofline       what bounds decoding; None for the fake backend
    """

    weights: Weights
    backend: str
    device: str
    device_name: str
    dtype: str
    kv_cache_dtype: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    memory: MemoryUse
    linear_bytes: int | None = None
    num_threads: int | None = None
    instruction_set: str | None = None
    device_uuid: str | None = None
    num_linear_parameters: int = 0
    num_layers: int = 0
    attention_width: int = 0
    hidden_size: int = 0
    notices: list[str] = []
    fallback: str | None = None
    load_s: float = 0.0
    quantized: str | None = None
    roofline: Roofline | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine has loaded its model and takes requests."""

    info: EngineInfo


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine can't start, or go on; it exits after this message."""

    message: str


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs"):
    """What one step brought. Also sent with no outputs, as a heartbeat, when the engine is idle."""

    outputs: list[TokenOutput]
    stats: EngineStats


ToEngine = EngineConfig | TokenBytes | Submit | Abort
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
