"""Ask every model the same, with the same seed: pip install openai."""

import os
import time

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BITWATT_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("BITWATT_KEY", "none"),
)
for model in client.models.list():
    started_s = time.perf_counter()
    completion = client.completions.create(
        model=model.id, prompt="def add(a, b):", max_tokens=24, temperature=0, seed=1
    )
    took_s = time.perf_counter() - started_s
    print(f"{model.id}: {completion.usage.completion_tokens} tokens in {took_s:.3f} s")
    print(completion.choices[0].text)
