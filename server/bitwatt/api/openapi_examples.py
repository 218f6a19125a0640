"""What answers and errors look like, for the API's description."""

from collections.abc import Mapping
from typing import Any

import msgspec

from bitwatt.api.errors import AnthropicErrorBody, ErrorBody, example_error, is_anthropic

__all__ = ["ANSWER_EXAMPLES", "error_example"]

_TEXT = "Remove any common leading whitespace from every line in `text`."
_CREATED = 1795447786
_REQUEST_ID = "54d38ab39e5ba79f0b1fe938"
_ENERGY = {
    "energy_joules": 0.412,
    "energy_extrapolated_joules": None,
    "energy_source": "rapl",
    "attribution": "proportional",
    "reason": None,
}
_TIMES = {
    "time_to_first_token_s": 0.0069,
    "queue_s": 0.0002,
    "prefill_s": 0.0053,
    "decode_s": 0.0127,
}
_TOOK = {**_ENERGY, "times": [_TIMES]}
_USAGE = {
    "prompt_tokens": 18,
    "completion_tokens": 13,
    "total_tokens": 31,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
    "bitwatt": _TOOK,
}
_MODEL = {
    "id": "builtin",
    "object": "model",
    "created": _CREATED,
    "owned_by": "bitwatt",
    "root": "ORG/NAME",
    "max_model_len": 4096,
    "weights": "ternary",
    "dtype": "bfloat16",
    "quantized": None,
    "default_sampling_params": {"temperature": 0.6, "top_p": 0.95},
}

ANSWER_EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "/v1/models": {"object": "list", "data": [_MODEL]},
    "/v1/models/{name}": _MODEL,
    "/v1/chat/completions": {
        "id": f"chatcmpl-{_REQUEST_ID}",
        "object": "chat.completion",
        "created": _CREATED,
        "model": "builtin",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": _TEXT, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    },
    "/v1/completions": {
        "id": f"cmpl-{_REQUEST_ID}",
        "object": "text_completion",
        "created": _CREATED,
        "model": "builtin",
        "choices": [
            {"index": 0, "text": " return a + b", "logprobs": None, "finish_reason": "stop"}
        ],
        "usage": _USAGE,
    },
    "/v1/responses": {
        "id": f"resp_{_REQUEST_ID}",
        "object": "response",
        "created_at": _CREATED,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": 24,
        "model": "builtin",
        "output": [
            {
                "type": "message",
                "id": f"msg_{_REQUEST_ID}",
                "status": "completed",
                "role": "assistant",
                "content": [
                    {"type": "output_text", "text": _TEXT, "annotations": [], "logprobs": []}
                ],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": 0.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 18,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 13,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 31,
            "bitwatt": _TOOK,
        },
        "metadata": {},
    },
    "/v1/messages": {
        "id": f"msg_{_REQUEST_ID}",
        "type": "message",
        "role": "assistant",
        "model": "builtin",
        "content": [{"type": "text", "text": _TEXT, "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 18,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 13,
            "bitwatt": _TOOK,
        },
    },
    "/v1/messages/count_tokens": {"input_tokens": 18},
    "/v1/embeddings": {
        "id": f"embd-{_REQUEST_ID}",
        "object": "list",
        "created": _CREATED,
        "model": "builtin",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
        "usage": {
            "prompt_tokens": 4,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
            "bitwatt": _ENERGY,
        },
    },
    "/tokenizer_info": {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"0": "<|bos|>", "1": "<|end|>"},
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    },
    "/tokenize": {
        "count": 4,
        "max_model_len": 4096,
        "tokens": [0, 561, 2230, 1176],
        "token_strs": None,
    },
    "/detokenize": {"prompt": "def main():"},
    "/health": {"status": "ok", "models": {"builtin": "ready"}},
    "/ready": {"status": "ready"},
    "/version": {"version": "0.1.0"},
}
"""A good answer to each path, of the model `builtin`."""

_ERRORS: Mapping[int, tuple[str, str | None, str | None]] = {
    400: ("temperature: 3 is more than 2", None, "temperature"),
    401: (
        "a valid API key is needed: Authorization: Bearer KEY, or x-api-key: KEY",
        "invalid_api_key",
        None,
    ),
    404: ("there is no model 'gpt'; served are builtin", "model_not_found", "model"),
    408: ("the body took longer than 30 s (--body-timeout)", None, None),
    413: ("the body has more than 16777216 bytes (--max-body-bytes)", "request_too_large", None),
    415: ("the body is not application/json", None, None),
    421: ("no host of this server's is named evil.example", "unknown_host", None),
    429: ("the key has 8 requests open, as many as it may", "rate_limit_exceeded", None),
    500: ("the engine gave the request up", "request_failed", None),
    503: ("128 requests wait (--max-queue)", "queue_full", None),
    504: ("the answer took longer than 600 s (--request-timeout)", "request_timeout", None),
}


def error_example(status: int, path: str) -> dict[str, Any]:
    """Return the body of such an error at the path, in the shape of its API."""
    message, code, param = _ERRORS[status]
    error = example_error(status, message, code, param)
    body: ErrorBody | AnthropicErrorBody = error.body
    if is_anthropic(path):
        _, body = error.for_anthropic(_REQUEST_ID)
    example: dict[str, Any] = msgspec.to_builtins(body)
    return example
