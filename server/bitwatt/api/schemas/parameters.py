"""Every parameter that a caller may send, and what becomes of it: the one table.

OpenAI's completions, chat, responses and embeddings and Anthropic's messages are here in full, and
what vLLM, SGLang and llama.cpp add to them. A parameter that no API here defines is passed over
and named to the caller. The tables of docs/parameters.md are made from this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from bitwatt.errors import shorten

__all__ = [
    "CALLED_FUNCTION",
    "CHAT",
    "COMPLETIONS",
    "CONTENT_PART",
    "DETOKENIZE",
    "EMBEDDINGS",
    "FUNCTION",
    "MESSAGE",
    "MESSAGES",
    "MESSAGES_COUNT",
    "MESSAGES_TOOL",
    "OUTPUT_CONFIG",
    "REASONING",
    "RESPONSES",
    "RESPONSES_STREAM_OPTIONS",
    "RESPONSES_TOOL",
    "STREAM_OPTIONS",
    "TEXT",
    "THINKING",
    "TOKENIZE",
    "TOOL",
    "TOOL_CALL",
    "Parameter",
    "Parameters",
    "refuse",
]


def refuse(message: str, param: str | None = None) -> PydanticCustomError:
    """Return the error to raise in a validator; param names the field where pydantic can't."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """What becomes of a parameter. null is always its default, and asks for nothing.

    api      whose it is
    works    whether it does what that API says: a field of the body
    neutral  else the values at which it asks for nothing, and passes; None for every value
    unless   a neighbour and its value, beside which every value passes
    note     what a caller should know besides
    """

    api: str
    works: bool = False
    neutral: tuple[Any, ...] | None = ()
    unless: tuple[str, Any] | None = None
    note: str = ""

    def check(self, name: str, value: object, body: Mapping[str, Any]) -> None:
        """Raise the error of a value that asks for what isn't done."""
        if value is None or self.neutral is None or any(_same(value, v) for v in self.neutral):
            return
        if self.unless is not None and body.get(self.unless[0]) == self.unless[1]:
            return
        raise refuse(f"{name} is not supported: {shorten(value)}", name)


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


Parameters = Mapping[str, Parameter]
"""Those of one body, by name."""


def _works(api: str, *names: str) -> dict[str, Parameter]:
    return {name: Parameter(api=api, works=True) for name in names}


def _harmless(api: str, *names: str, note: str = "") -> dict[str, Parameter]:
    """Return parameters that ask for nothing that could change an answer, whatever they are."""
    return {name: Parameter(api=api, neutral=None, note=note) for name in names}


def _refused(
    api: str,
    *names: str,
    at: tuple[Any, ...] = (),
    unless: tuple[str, Any] | None = None,
    note: str = "",
) -> dict[str, Parameter]:
    """Return parameters that ask for what isn't done, but for the values `at`."""
    return {name: Parameter(api=api, neutral=at, unless=unless, note=note) for name in names}


_GENERATION: Parameters = {
    **_works(
        "OpenAI",
        "model",
        "max_tokens",
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "seed",
        "n",
        "stop",
        "stream",
        "stream_options",
    ),
    **_harmless("OpenAI", "metadata", "safety_identifier", "user", note="Nothing is kept of it."),
    **_harmless(
        "OpenAI",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        note="The prefix cache keeps what it has room for.",
    ),
    **_harmless("OpenAI", "service_tier", note="There is one."),
    **_refused("OpenAI", "best_of", at=(1,)),
    **_refused("OpenAI", "store", at=(False,)),
    **_works(
        "vLLM",
        "min_tokens",
        "top_k",
        "min_p",
        "prompt_logprobs",
        "repetition_penalty",
        "stop_token_ids",
        "ignore_eos",
        "priority",
        "cache_salt",
        "structured_outputs",
        "add_special_tokens",
    ),
    **_harmless("vLLM", "request_id", "session_id", note="`X-Request-Id` is what comes back."),
    **_harmless("vLLM", "spaces_between_special_tokens", note="Special tokens are left out."),
    **_harmless("vLLM", "truncation_side", "guided_decoding_backend", "return_mm_kwargs"),
    **_refused(
        "vLLM",
        "allowed_token_ids",
        "ec_transfer_params",
        "kv_transfer_params",
        "logprob_token_ids",
        "repetition_detection",
        "truncate_prompt_tokens",
    ),
    **_refused(
        "vLLM",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "guided_whitespace_pattern",
        note="`structured_outputs` works.",
    ),
    **_refused("vLLM", "bad_words", "logits_processors", at=([],)),
    **_refused("vLLM", "vllm_xargs", at=({},)),
    **_harmless(
        "vLLM", "early_stopping", "length_penalty", note="Of beam search, which is refused."
    ),
    **_refused("vLLM", "routed_experts_prompt_start", at=(0,)),
    **_refused("vLLM", "skip_special_tokens", at=(True,)),
    **_refused("vLLM", "stream_interval", at=(1,)),
    **_refused("vLLM", "thinking_token_budget", at=(-1,)),
    **_refused(
        "vLLM",
        "include_stop_str_in_output",
        "return_token_ids",
        "return_token_offsets",
        "return_tokens_as_token_ids",
        "use_beam_search",
        "watermarking",
        at=(False,),
    ),
    **_works("vLLM", "response_format"),
    **_harmless("SGLang", "rid", note="`X-Request-Id` is what comes back."),
    **_harmless("SGLang", "custom_labels", note="No metric has them."),
    **_harmless(
        "SGLang",
        "bootstrap_host",
        "bootstrap_port",
        "bootstrap_room",
        "data_parallel_rank",
        "disagg_prefill_dp_rank",
        "routed_dp_rank",
        note="A router's word to its workers.",
    ),
    **_refused(
        "SGLang",
        "custom_logit_processor",
        "custom_params",
        "images_config",
        "lora_path",
        "ngram_corpus_id",
        "session_params",
        "stop_regex",
    ),
    **_refused("SGLang", "ebnf", "regex", note="`structured_outputs` works."),
    **_refused("SGLang", "extra_key", note="`cache_salt` keeps a cache apart."),
    **_refused(
        "SGLang",
        "no_stop_trim",
        "return_cached_tokens_details",
        "return_hidden_states",
        "return_routed_experts",
        at=(False,),
    ),
    **_refused("SGLang", "routed_experts_start_len", at=(0,)),
    **_harmless("llama.cpp", "cache_prompt", note="`--no-prefix-caching` decides."),
    **_harmless("llama.cpp", "id_slot"),
    **_harmless(
        "llama.cpp",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "mirostat_eta",
        "mirostat_tau",
        "repeat_last_n",
        "xtc_threshold",
        note="Says how another does it, which is refused.",
    ),
    **_refused("llama.cpp", "grammar", "json_schema", note="`structured_outputs` works."),
    **_refused("llama.cpp", "samplers"),
    **_refused("llama.cpp", "n_predict", note="`max_tokens` works."),
    **_refused("llama.cpp", "repeat_penalty", at=(1.0,), note="`repetition_penalty` works."),
    **_refused("llama.cpp", "tfs_z", "typ_p", "typical_p", at=(1.0,)),
    **_refused("llama.cpp", "top_n_sigma", at=(-1.0, 0)),
    **_refused("llama.cpp", "lora", "response_fields", at=([],)),
    **_refused("llama.cpp", "t_max_predict_ms", at=(-1, 0)),
    **_refused(
        "llama.cpp",
        "dry_multiplier",
        "dynatemp_range",
        "min_keep",
        "mirostat",
        "n_discard",
        "n_indent",
        "n_keep",
        "n_probs",
        "xtc_probability",
        at=(0,),
    ),
    **_refused(
        "llama.cpp",
        "post_sampling_probs",
        "return_progress",
        "return_tokens",
        "timings_per_token",
        at=(False,),
    ),
}

COMPLETIONS: Parameters = {
    **_GENERATION,
    **_works("OpenAI", "prompt", "echo"),
    **_refused("OpenAI", "suffix", at=("",)),
    **_refused("vLLM", "prompt_embeds"),
}

CHAT: Parameters = {
    **_GENERATION,
    **_works("OpenAI", "messages", "max_completion_tokens", "top_logprobs"),
    **_works("OpenAI", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"),
    **_harmless("OpenAI", "prediction", note="A hint at speed; the answer is the same."),
    **_harmless("OpenAI", "verbosity", note="Says nothing to a model without it."),
    **_refused("OpenAI", "audio", "moderation", "web_search_options"),
    **_refused("OpenAI", "modalities", at=(["text"],)),
    **_works("OpenAI", "response_format"),
    **_refused(
        "OpenAI", "functions", at=([],), unless=("function_call", "none"), note="`tools` works."
    ),
    **_refused("OpenAI", "function_call", at=("none", "auto"), note="`tool_choice` works."),
    **_works(
        "vLLM",
        "chat_template_kwargs",
        "include_reasoning",
        "thinking_token_budget",
        "add_generation_prompt",
        "continue_final_message",
    ),
    **_refused("vLLM", "chat_template"),
    **_refused("vLLM", "echo", "return_prompt_text", at=(False,)),
    **_refused("vLLM", "documents", at=([],)),
    **_refused("vLLM", "media_io_kwargs", "mm_processor_kwargs", at=({},)),
    **_refused(
        "SGLang",
        "separate_reasoning",
        "stream_reasoning",
        at=(True,),
        note="Reasoning is told from the answer, and streamed.",
    ),
    **_refused(
        "llama.cpp",
        "reasoning_format",
        at=("auto", "deepseek"),
        note="Reasoning is told from the answer.",
    ),
    **_refused("llama.cpp", "parse_tool_calls", at=(True,), note="`tool_choice` works."),
    **_refused("llama.cpp", "thinking_forced_open", at=(False,)),
}
"""`echo` is vLLM's here, not OpenAI's."""

STREAM_OPTIONS: Parameters = {
    **_works("OpenAI", "include_usage", "include_obfuscation"),
    **_works("vLLM", "continuous_usage_stats"),
}

MESSAGE: Parameters = {
    **_works("OpenAI", "role", "content", "name", "refusal", "tool_calls", "tool_call_id"),
    **_works("vLLM", "reasoning", "reasoning_content"),
    **_harmless("OpenAI", "annotations", "id", note="Of an answer that comes back as history."),
    **_harmless("OpenAI", "parsed", note="The SDK's; `content` has the same."),
    **_harmless("LiteLLM", "cache_control", note="Every prefix is cached."),
    **_refused("OpenAI", "audio", "function_call"),
}

TOOL: Parameters = {
    **_works("OpenAI", "type", "function"),
    **_harmless("LiteLLM", "cache_control", note="Every prefix is cached."),
}

FUNCTION: Parameters = _works("OpenAI", "name", "description", "parameters", "strict")

TOOL_CALL: Parameters = {
    **_works("OpenAI", "id", "type", "function"),
    **_harmless("OpenAI", "index", note="Of a stream that comes back as history."),
}

CALLED_FUNCTION: Parameters = _works("OpenAI", "name", "arguments")

CONTENT_PART: Parameters = {
    **_works("OpenAI", "type", "text", "refusal"),
    **_harmless("OpenAI", "annotations", note="Of an answer that comes back as history."),
    **_harmless("OpenAI", "prompt_cache_breakpoint", note="Every prefix is cached."),
    **_harmless("LiteLLM", "cache_control", note="Every prefix is cached."),
}

_SAMPLING: Parameters = _works(
    "vLLM",
    "min_tokens",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "priority",
    "cache_salt",
    "structured_outputs",
    "chat_template_kwargs",
)
"""What vLLM adds to both of the APIs below, or to OpenAI's others."""

RESPONSES: Parameters = {
    **_works(
        "OpenAI",
        "model",
        "input",
        "instructions",
        "max_output_tokens",
        "metadata",
        "reasoning",
        "stream",
        "stream_options",
        "temperature",
        "text",
        "top_p",
    ),
    **_harmless("OpenAI", "safety_identifier", "user", note="Nothing is kept of it."),
    **_harmless(
        "OpenAI",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        note="The prefix cache keeps what it has room for.",
    ),
    **_harmless("OpenAI", "service_tier", note="There is one."),
    **_harmless("OpenAI", "max_tool_calls", note="Of tools that the server runs: there are none."),
    **_harmless("OpenAI", "access_programs", "background_options", "image"),
    **_refused("OpenAI", "background", at=(False,)),
    **_refused("OpenAI", "context_management", at=([],)),
    **_refused(
        "OpenAI", "include", at=([], ["reasoning.encrypted_content"]), note="Nothing is encrypted."
    ),
    **_refused(
        "OpenAI",
        "conversation",
        "moderation",
        "previous_response_id",
        "prompt",
        note="Nothing is kept between requests: send the whole conversation as `input`.",
    ),
    **_refused(
        "OpenAI",
        "store",
        at=(False,),
        note="No response is kept. Its items are for a while, unless false.",
    ),
    **_refused("OpenAI", "top_logprobs", at=(0,)),
    **_refused("OpenAI", "truncation", at=("disabled",)),
    **_works("OpenAI", "tools", "tool_choice", "parallel_tool_calls"),
    **_SAMPLING,
    **_works("vLLM", "stop"),
    **_harmless("vLLM", "request_id", note="`X-Request-Id` is what comes back."),
    **_refused("vLLM", "kv_transfer_params", "previous_input_messages"),
    **_refused("vLLM", "chat_template"),
    **_refused("vLLM", "mm_processor_kwargs", "vllm_xargs", at=({},)),
    **_refused("vLLM", "skip_special_tokens", at=(True,)),
    **_refused("vLLM", "enable_response_messages", "include_stop_str_in_output", at=(False,)),
}

RESPONSES_TOOL: Parameters = {
    **_works("OpenAI", "type", "name", "description", "parameters", "strict"),
    **_harmless("OpenAI", "output_schema", note="Templates tell the model of no such thing."),
    **_refused("OpenAI", "allowed_callers", at=([], ["direct"])),
    **_refused("OpenAI", "async", at=(False,), note="The caller runs every tool."),
    **_refused("OpenAI", "defer_loading", at=(False,), note="The model sees every tool."),
    **_harmless("LiteLLM", "cache_control", note="Every prefix is cached."),
}

RESPONSES_STREAM_OPTIONS: Parameters = _works("OpenAI", "include_obfuscation")

TEXT: Parameters = {
    **_works("OpenAI", "format"),
    **_harmless("OpenAI", "verbosity", note="The model has one."),
}

REASONING: Parameters = {
    **_works("OpenAI", "effort"),
    **_harmless("OpenAI", "context", "mode"),
    **_harmless(
        "OpenAI", "generate_summary", "summary", note="Reasoning comes whole, and no summary of it."
    ),
}

_CONVERSATION: Parameters = {
    **_works("Anthropic", "model", "messages", "system", "thinking", "output_config"),
    **_works("Anthropic", "tools", "tool_choice"),
    **_refused("Anthropic", "mcp_servers", at=([],)),
    **_refused("Anthropic", "context_management", at=({},)),
    **_harmless("Anthropic", "cache_control", note="Every prefix is cached."),
    **_harmless(
        "Anthropic", "speed", "user_profile_id", "workspace_id", note="Of Anthropic's own service."
    ),
    **_works("vLLM", "chat_template_kwargs"),
}

MESSAGES: Parameters = {
    **_CONVERSATION,
    **_works(
        "Anthropic",
        "max_tokens",
        "stop_sequences",
        "stream",
        "temperature",
        "top_p",
    ),
    **_harmless("Anthropic", "metadata", note="Nothing is kept of it."),
    **_harmless("Anthropic", "diagnostics", "inference_geo", "service_tier"),
    **_refused("Anthropic", "container"),
    **_SAMPLING,
    **_works("Anthropic", "top_k"),
    **_refused("vLLM", "kv_transfer_params"),
}

MESSAGES_COUNT: Parameters = _CONVERSATION

MESSAGES_TOOL: Parameters = {
    **_works("Anthropic", "type", "name", "description", "input_schema", "strict"),
    **_harmless("Anthropic", "cache_control", note="Every prefix is cached."),
    **_harmless("Anthropic", "eager_input_streaming", note="Input is streamed as it is drawn."),
    **_refused("Anthropic", "allowed_callers", at=([], ["direct"])),
    **_refused("Anthropic", "defer_loading", at=(False,), note="The model sees every tool."),
    **_refused("Anthropic", "input_examples", at=([],), note="`description` may have them."),
}

THINKING: Parameters = _works("Anthropic", "type", "budget_tokens", "display")

OUTPUT_CONFIG: Parameters = {
    **_works("Anthropic", "format", "effort"),
    **_harmless("Anthropic", "task_budget", note="The model knows of none."),
}

TOKENIZE: Parameters = {
    **_works(
        "vLLM",
        "model",
        "prompt",
        "messages",
        "add_special_tokens",
        "add_generation_prompt",
        "return_token_strs",
        "chat_template_kwargs",
        "continue_final_message",
        "tools",
    ),
    **_refused("vLLM", "chat_template"),
    **_refused("vLLM", "media_io_kwargs", "mm_processor_kwargs", at=({},)),
}

DETOKENIZE: Parameters = _works("vLLM", "model", "tokens")

EMBEDDINGS: Parameters = {
    **_works("OpenAI", "model", "input", "encoding_format", "dimensions"),
    **_harmless("OpenAI", "user", note="Nothing is kept of it."),
    **_works("vLLM", "add_special_tokens", "priority", "cache_salt"),
    **_harmless("vLLM", "request_id", note="`X-Request-Id` is what comes back."),
    **_harmless("vLLM", "truncation_side", note="Nothing is truncated."),
    **_refused("vLLM", "messages", "chat_template", note="`input` works."),
    **_harmless(
        "vLLM",
        "add_generation_prompt",
        "chat_template_kwargs",
        "continue_final_message",
        note="Of `messages`, which are refused.",
    ),
    **_refused("vLLM", "truncate_prompt_tokens", note="A text that is too long is a 400."),
    **_refused("vLLM", "normalize", "use_activation", at=(True,), note="Each has length 1."),
    **_refused("vLLM", "embed_dtype", at=("float32",)),
    **_refused("vLLM", "endianness", at=("native", "little")),
    **_refused("vLLM", "media_io_kwargs", "mm_processor_kwargs", at=({},)),
    **_harmless("SGLang", "rid", note="`X-Request-Id` is what comes back."),
    **_refused("SGLang", "lora_path"),
    **_refused("llama.cpp", "content", note="`input` works."),
    **_refused("llama.cpp", "embd_normalize", at=(2,), note="Each has length 1."),
}
