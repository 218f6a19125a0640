"""Chat through OpenAI's own client: pip install openai."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BITWATT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("BITWATT_KEY", "none"),
)
stream = client.chat.completions.create(
    model=os.environ.get("BITWATT_MODEL", "builtin"),
    messages=[{"role": "user", "content": "What does os.path.join do?"}],
    max_tokens=64,
    seed=1,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    if chunk.usage is not None:
        print(f"\n[{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")
