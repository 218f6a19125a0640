"""The server over a model that plays a part: it thinks, calls the tool, and tells its result."""

import asyncio
import sys
from dataclasses import dataclass, field

from bitwatt.engine.messages import Submit, TokenOutput
from bitwatt.text.processor import TextProcessor

from tests.fakes import FakeEngine, make_app, make_info, run_server
from tests.server.api.test_tools import THINKER, make_tools_text

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@dataclass
class ScriptedEngine(FakeEngine):
    """Answers by what stands in the prompt."""

    text: TextProcessor = field(default_factory=lambda: make_tools_text(THINKER))

    def _outputs(self, request: Submit) -> list[TokenOutput]:
        prompt = self.text.codec.decode(request.prompt_token_ids)
        if "<|im_start|>tool\n" in prompt:
            self.reply = "It is sunny in Rome."
        elif '"name": "weather"' in prompt:
            self.reply = f"<think>The tool knows.</think>{CALL}"
        else:
            self.reply = "Hello."
        return super()._outputs(request)


async def main() -> None:
    """Serve, say where, and stop where the input ends."""
    engine = ScriptedEngine()
    engine.info = make_info(vocab_size=len(engine.text.vocabulary), max_model_len=50_000)
    async with run_server(make_app(engine, text=engine.text)) as url:
        print(url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
