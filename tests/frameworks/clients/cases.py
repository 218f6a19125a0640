"""What every client's script has: where the servers are, and how its cases run.

REAL answers with the embedded model, SCRIPTED with one that plays a part, in tools and thinking.
"""

import asyncio
import inspect
import json
import os
import traceback
from collections.abc import Callable
from typing import Any

REAL = os.environ.get("REAL_URL", "")
SCRIPTED = os.environ.get("SCRIPTED_URL", "")
QUESTION = "How is the weather in Rome?"
ANSWER = "It is sunny in Rome."
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def run(*cases: Callable[[], Any]) -> None:
    """Run the cases, and print a line of JSON for each: its name, and what went wrong, if aught."""
    for case in cases:
        fault = None
        try:
            result = case()
            if inspect.isawaitable(result):
                asyncio.run(_until(result))
        except Exception as error:
            if os.environ.get("VERBOSE"):
                traceback.print_exc()
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(json.dumps({"case": case.__name__, "fault": fault}), flush=True)


async def _until(result: Any) -> None:
    await result
