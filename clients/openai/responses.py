"""The Responses API through OpenAI's own client: pip install openai."""

import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BITWATT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("BITWATT_KEY", "none"),
)
response = client.responses.create(
    model=os.environ.get("BITWATT_MODEL", "builtin"),
    instructions="Answer in one sentence.",
    input="What does os.path.join do?",
    max_output_tokens=64,
)
print(response.output_text)
print(f"[{response.usage.input_tokens} + {response.usage.output_tokens} tokens]")
