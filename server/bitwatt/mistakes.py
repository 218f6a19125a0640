"""What a person meant who wrote a flag, a command or a variable that there is none of."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

__all__ = ["about_flag", "did_you_mean", "unknown_variables"]

_OF_OTHER_SERVERS = {
    "model": "the model has no flag: bitwatt serve PATH, or ORG/NAME",
    "tokenizer": "the tokenizer is the one in the model's folder",
    "chat-template": "the chat template is the one in the model's folder",
    "revision": "write bitwatt serve ORG/NAME@REVISION",
    "download-dir": "models are kept where the hub's cache is (HF_HOME); leave it out",
    "load-format": "the folder says how its weights are stored",
    "quantization": "the folder says how its weights are stored, and --weights which are served",
    "trust-remote-code": "no code of a model's folder is ever run; leave it out",
    "tensor-parallel-size": "an engine runs on one device; leave it out",
    "pipeline-parallel-size": "an engine runs on one device; leave it out",
    "data-parallel-size": "a model has one engine; leave it out",
    "enable-prefix-caching": "prefixes are reused without it; --no-prefix-caching turns that off",
    "no-enable-prefix-caching": "write --no-prefix-caching",
    "enable-chunked-prefill": "long prompts are always computed in pieces "
    "(--max-num-batched-tokens); leave it out",
    "enforce-eager": "there is one way to run a model; leave it out",
    "seed": "a request has a seed of its own, a new one where it gives none",
    "kv-cache-memory-bytes": "write --kv-cache-bytes",
    "swap-space": "nothing is moved between the GPU's memory and the machine's; leave it out",
    "cpu-offload-gb": "nothing is moved between the GPU's memory and the machine's; leave it out",
    "enable-log-requests": "no request is logged, for prompts are their callers'",
    "disable-log-requests": "no request is logged; leave it out",
    "uvicorn-log-level": "write --log-level",
    "allowed-origins": "write --cors-origins",
    "otlp-traces-endpoint": "write --otlp-endpoint",
    "ssl-keyfile": "TLS is for a proxy in front of the server",
    "ssl-certfile": "TLS is for a proxy in front of the server",
    "dollars-per-hour": "write --usd-per-hour",
    "dollars-per-hour-b": "write --usd-per-hour-b",
}
_EXAMPLES_AND_TESTS = re.compile(r"BITWATT_(URL|MODEL|KEY|TEST_\w+)")
# Kubernetes tells every pod of the Services beside it: BITWATT_SERVICE_HOST for one of our name.
_SERVICE = re.compile(
    r"\w+_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the nearest of the known names, "" where none is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def about_flag(argument: str, known: Iterable[str]) -> str:
    """Return what is wrong with an argument that the command line does not know.

    known  the flags there are, as --port
    """
    flag = argument.partition("=")[0]
    if not flag.startswith("-"):
        return f"{argument!r} is one argument too many"
    known = list(known)
    name = flag.lstrip("-").lower().replace("_", "-")
    if f"--{name}" not in known and name in _OF_OTHER_SERVERS:
        return f"{flag} is no flag here: {_OF_OTHER_SERVERS[name]}"
    return f"{flag} is no flag{did_you_mean(f'--{name}', known)}"


def unknown_variables(environ: Mapping[str, str], known: Iterable[str]) -> list[str]:
    """Return a sentence for each variable that begins with BITWATT_ and sets nothing.

    known  the variables there are, as BITWATT_PORT
    """
    known = list(known)
    return [
        f"{name} sets nothing: there is no such variable{did_you_mean(name, known)}"
        for name, value in sorted(environ.items())
        if name.startswith("BITWATT_") and name not in known and not _is_anothers(name, value)
    ]


def _is_anothers(name: str, value: str) -> bool:
    is_service = _SERVICE.fullmatch(name) or value.startswith(("tcp://", "udp://", "sctp://"))
    return bool(is_service or _EXAMPLES_AND_TESTS.fullmatch(name))
