import json
from pathlib import Path

import pytest
import torch
from bitwatt.builtin import FP16, TERNARY
from safetensors.torch import load_file

FOLDERS = pytest.mark.parametrize("folder", [TERNARY, FP16], ids=["ternary", "fp16"])


@FOLDERS
def test_the_folder_holds_all_that_hugging_face_reads(folder: Path):
    for name in (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ):
        assert (folder / name).is_file()


def test_the_pair_stays_under_35_megabytes():
    files = [path for folder in (TERNARY, FP16) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 35_000_000


@FOLDERS
def test_the_card_names_its_command_its_tokens_and_both_losses(folder: Path):
    card = (folder / "README.md").read_text()
    curve = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    assert "python -m bitwatt.training train --arch" in card
    assert f"{curve[-1]['tokens']:,} tokens" in card
    assert "| ternary |" in card
    assert "| 16-bit twin |" in card
    assert curve[-1]["validation_nats_per_token"] < curve[0]["validation_nats_per_token"]


def test_the_pair_shares_one_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TERNARY / name).read_bytes() == (FP16 / name).read_bytes()


def test_every_ternary_tensor_has_codes_of_all_three_kinds():
    tensors = load_file(str(TERNARY / "model.safetensors"))
    packed = {name: tensor for name, tensor in tensors.items() if tensor.dtype == torch.uint8}
    assert len(packed) == 6 * 7
    for name, tensor in packed.items():
        codes = torch.cat([tensor >> shift & 3 for shift in (0, 2, 4, 6)])
        counts = torch.bincount(codes.flatten().long(), minlength=4)
        assert counts[3] == 0, name
        assert counts[:3].min() > 0.05 * codes.numel(), name


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@FOLDERS
def test_transformers_reads_the_folder_and_knows_python_from_noise(folder: Path):
    transformers = pytest.importorskip("transformers")
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        text = "def read(self, size=-1):\n    if self.closed:\n        raise ValueError('closed')\n"
        tokens = tokenizer(text, return_tensors="pt")["input_ids"]
        loss = model(tokens, labels=tokens).loss.item()
        shuffled = tokens[:, torch.randperm(tokens.shape[1], generator=torch.Generator())]
        noise = model(shuffled, labels=shuffled).loss.item()
        output = model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert loss < 5.5 < noise
    assert tokenizer.decode(output[0], skip_special_tokens=True).startswith(text)
