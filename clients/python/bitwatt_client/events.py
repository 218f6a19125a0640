"""The events of a streamed answer, as OpenAI-compatible servers send them."""

import json
import time
from dataclasses import dataclass, field

from bitwatt_client.errors import StreamError

__all__ = ["Chunk", "read_comment", "read_event"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One event of a stream.

    text, reasoning                what it adds to the answer, and to the thinking before it
    read_s                         when it was read, as time.perf_counter() tells; what waited
                                   together for its reader has one time
    num_prompt_tokens, num_tokens  with the last chunk, as the server counted them
    energy_joules, energy_reason   with it too: what the request took, or why that isn't known
    cost_usd                       what the server says the request cost
    """

    text: str
    finish_reason: str | None = None
    num_prompt_tokens: int | None = None
    num_tokens: int | None = None
    energy_joules: float | None = None
    energy_reason: str | None = None
    read_s: float = field(default_factory=time.perf_counter)
    reasoning: str = ""
    cost_usd: float | None = None

    @property
    def is_output(self) -> bool:
        """Whether it has something the model generated, or the end."""
        return bool(self.text or self.reasoning or self.finish_reason is not None)


def read_event(data: str, read_s: float) -> Chunk:
    """Return an event of /v1/chat/completions or /v1/completions.

    Raises  StreamError where it is none, or tells of an error
    """
    try:
        event = json.loads(data)
        if "error" in event:
            raise StreamError(str(event["error"]["message"]))
        usage = event.get("usage") or {}
        energy = usage.get("bitwatt") or event.get("energy") or {}
        choices = event["choices"]
        choice = choices[0] if choices else {}
        delta = choice.get("delta") or choice
        return Chunk(
            text=delta.get("content") or delta.get("text") or "",
            reasoning=delta.get("reasoning_content") or delta.get("reasoning") or "",
            finish_reason=choice.get("finish_reason"),
            num_prompt_tokens=usage.get("prompt_tokens"),
            num_tokens=usage.get("completion_tokens"),
            energy_joules=energy.get("energy_joules"),
            energy_reason=energy.get("reason"),
            cost_usd=(event.get("cost") or {}).get("request_cost_usd"),
            read_s=read_s,
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise StreamError(f"an event makes no sense: {data[:200]}") from error


def read_comment(line: str, read_s: float) -> Chunk | None:
    """Return what a comment of a stream tells of energy or cost, by Neuralwatt's names.

    None for any other comment
    """
    name, _, told = line.removeprefix(":").strip().partition(" ")
    if name not in ("energy", "cost"):
        return None
    try:
        fields = json.loads(told)
        return Chunk(
            "",
            energy_joules=fields.get("energy_joules"),
            energy_reason=fields.get("reason") if name == "energy" else None,
            cost_usd=fields.get("request_cost_usd"),
            read_s=read_s,
        )
    except (ValueError, AttributeError):
        return None
