"""Ask llama.cpp and bitwatt for the greedy tokens of one exported file; the last line is JSON.

    python -m bitwatt.bench.llama_cpp_tokens [--python PYTHON] [--count 64]

Tiny models of random ternary weights, of each architecture that llama.cpp has with SiLU, with the
embedded model's tokenizer, are exported by `bitwatt convert`'s code as TQ2_0 and as Q2_0. bitwatt
scores llama.cpp's tokens with `--weights dense` in float32, which is the weights' own arithmetic;
llama.cpp rounds activations to 8 bits. Where a token isn't bitwatt's likeliest, what lies between
it and that one is told, in nats: a rounding decides between near ties alone.

--python  an interpreter that has llama-cpp-python; python -m bitwatt.bench.peers makes one
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitwatt import builtin
from bitwatt.checkpoints.gguf_export import GgufTarget, convert_to_gguf
from bitwatt.llm import LLM
from bitwatt.serving.sampling_params import SamplingParams
from bitwatt.text.codec import TextCodec
from bitwatt.text.gguf_vocabulary import check_gguf_text, gguf_text

CHILD = Path(__file__).parent / "peer_child.py"
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 512, 2, 4, 2, 64, 4096
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "BitnetForCausalLM": "bitnet",
}
TEXTS = ("def main(x):\n    return [1, 22, 333]\n", "Größe 🙂  and   spaces", "<|user|>hello")


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What one file brought.

    num_equal    of llama.cpp's greedy tokens that are bitwatt's, too, after the same tokens
    apart        nats that the others lie behind bitwatt's at most
    texts_equal  whether both tokenizers read TEXTS alike
    """

    architecture: str
    target: GgufTarget
    num_tokens: int
    num_equal: int
    apart: float
    texts_equal: bool


def write_folder(folder: Path, architecture: str, group: int | None, seed: int) -> None:
    """Write a model of float16 linears that are exactly ternary, by rows or by groups."""
    generator = torch.Generator().manual_seed(seed)

    def ternary(rows: int, columns: int) -> Tensor:
        width = group or columns
        scales = (0.7 + 0.6 * torch.rand(rows, columns // width, generator=generator)).half()
        scales = (scales * (1.5 / columns) ** 0.5).half().repeat_interleave(width, dim=1)
        values: Tensor = scales * torch.randint(-1, 2, (rows, columns), generator=generator)
        return values

    def vector(size: int, around: float = 1.0) -> Tensor:
        return torch.randn(size, generator=generator) * 0.2 + around

    tensors = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=generator).half(),
        "lm_head.weight": (torch.randn(VOCAB, HIDDEN, generator=generator) / 8).half(),
        "model.norm.weight": vector(HIDDEN),
    }
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for linear, rows, columns in (
            ("self_attn.q_proj", queries, HIDDEN),
            ("self_attn.k_proj", keys, HIDDEN),
            ("self_attn.v_proj", keys, HIDDEN),
            ("self_attn.o_proj", HIDDEN, queries),
            ("mlp.gate_proj", INNER, HIDDEN),
            ("mlp.up_proj", INNER, HIDDEN),
            ("mlp.down_proj", HIDDEN, INNER),
        ):
            tensors[f"{name}.{linear}.weight"] = ternary(rows, columns)
            if architecture == "Qwen2ForCausalLM" and linear[10:] in ("q_proj", "k_proj", "v_proj"):
                tensors[f"{name}.{linear}.bias"] = vector(rows, 0.0)
        tensors[f"{name}.input_layernorm.weight"] = vector(HIDDEN)
        tensors[f"{name}.post_attention_layernorm.weight"] = vector(HIDDEN)
        if architecture == "Qwen3ForCausalLM":
            tensors[f"{name}.self_attn.q_norm.weight"] = vector(HEAD_DIM)
            tensors[f"{name}.self_attn.k_norm.weight"] = vector(HEAD_DIM)
        if architecture == "BitnetForCausalLM":
            tensors[f"{name}.self_attn.attn_sub_norm.weight"] = vector(queries)
            tensors[f"{name}.mlp.ffn_sub_norm.weight"] = vector(INNER)
    is_tied = architecture == "BitnetForCausalLM"  # which llama.cpp knows with no head of its own
    if is_tied:
        tensors["model.embed_tokens.weight"] = tensors.pop("lm_head.weight")
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [architecture],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": is_tied,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(builtin.TERNARY / name, folder / name)


def ask_llama_cpp(python: str, path: Path, prompt: list[int], count: int) -> dict[str, Any]:
    """Return llama.cpp's greedy tokens, and the ids that it reads TEXTS as."""
    asked = json.dumps({"prompt": prompt, "count": count, "texts": TEXTS})
    command = [python, "-P", str(CHILD), "tokens", str(path)]
    done = subprocess.run(  # noqa: S603  # an interpreter that the caller names
        command, input=asked, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed on {path.name}: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def agree(python: str, path: Path, architecture: str, target: GgufTarget, count: int) -> Agreement:
    """Return how far the two agree about a file."""
    codec = TextCodec.from_folder(path)
    prompt = codec.encode("def main(values):\n")
    theirs = ask_llama_cpp(python, path, prompt, count)
    scored = SamplingParams(max_tokens=0, prompt_logprobs=1)
    settings: dict[str, Any] = {"backend": "torch", "dtype": "float32", "kv_cache_bytes": 1 << 24}
    with LLM(path, weights="dense", **settings) as llm:
        [answer] = llm.generate([[*prompt, *theirs["greedy"]]], scored)
    behind = [
        one.top[0][1] - one.logprob
        for one in answer.prompt_logprobs[len(prompt) :]
        if one is not None
    ]
    return Agreement(
        architecture=architecture,
        target=target,
        num_tokens=count,
        num_equal=behind.count(0.0),
        apart=max(behind),
        texts_equal=[codec.encode(text) for text in TEXTS] == theirs["encoded"],
    )


def main() -> None:
    """Compare every architecture in every format; leave with status 1 where they disagree."""
    parser = argparse.ArgumentParser(
        prog="python -m bitwatt.bench.llama_cpp_tokens",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--python", default="build/peers/llama-cpp-python/bin/python")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=0.1, help="nats of a near tie")
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed, (hf_name, name) in enumerate(ARCHITECTURES.items()):
            for target in get_args(GgufTarget):
                folder = Path(scratch) / f"{name}-{target}"
                write_folder(folder, hf_name, None if target == "gguf-tq2_0" else 64, seed)
                path = folder.with_suffix(".gguf")
                convert_to_gguf(
                    folder,
                    path,
                    target,
                    texts=partial(gguf_text, folder),
                    check_texts=partial(check_gguf_text, folder),
                )
                found.append(agree(options.python, path, name, target, options.count))
                print(found[-1], file=sys.stderr, flush=True)
    print(json.dumps([asdict(one) for one in found]))
    agreed = (one.texts_equal and one.apart < options.tolerance for one in found)
    sys.exit(0 if all(agreed) else 1)


if __name__ == "__main__":
    main()
