"""Chat through Anthropic's own client: pip install anthropic."""

import os

from anthropic import Anthropic

client = Anthropic(
    base_url=os.environ.get("BITWATT_URL", "http://127.0.0.1:8000"),
    api_key=os.environ.get("BITWATT_KEY", "none"),
)
with client.messages.stream(
    model=os.environ.get("BITWATT_MODEL", "builtin"),
    messages=[{"role": "user", "content": "What does os.path.join do?"}],
    max_tokens=64,
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    usage = stream.get_final_message().usage
print(f"\n[{usage.input_tokens} + {usage.output_tokens} tokens]")
