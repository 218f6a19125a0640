"""Other engines are timed on files of the right form, in turns with ours."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest
import torch
from bitwatt.bench import peers
from bitwatt.bench.cpu_child import ChildConfig
from bitwatt.bench.peer_files import FORMATS, write_bf16_folder, write_gguf
from bitwatt.bench.peers import Peer, as_markdown, compare
from bitwatt.checkpoints.gguf_file import open_gguf
from bitwatt.checkpoints.registry import load_model
from bitwatt.model.presets import PRESETS
from bitwatt_kernels.reference.reference_backend import ReferenceBackend

TINY = replace(
    PRESETS["2B4T"],
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    bos_token_id=0,
    eos_token_ids=(1,),
)

A_PEER = """#!{python}
import json, sys
assert sys.argv[1] == "-P" and sys.argv[3:5] == ["serve", "llama-cpp-python"], sys.argv
print("a library says something")
print(json.dumps({{"version": "peer 1"}}), flush=True)
for line in sys.stdin:
    kind, count = line.split()
    print(json.dumps({{"seconds": 2.0 * int(count)}}), flush=True)
"""


@pytest.mark.parametrize("linears", ["F16", "TQ2_0", "Q2_0"])
@pytest.mark.parametrize("embedding", ["F16", "Q8_0", "Q2_0"])
def test_files_hold_each_tensor_in_its_format(tmp_path: Path, linears: str, embedding: str) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, TINY, linears, embedding)
    tensors = open_gguf(path).tensors
    assert len(tensors) == 2 + TINY.num_layers * 11
    assert tensors["token_embd.weight"].shape == (512, 256)
    assert tensors["token_embd.weight"].layout.name == embedding
    assert tensors["blk.1.ffn_down.weight"].shape == (256, 512)
    assert tensors["blk.1.ffn_down.weight"].layout.name == linears


def test_a_row_of_iq2_bn_is_a_float_and_two_bits_a_weight() -> None:
    data = FORMATS["IQ2_BN"].random(3, 256)
    assert data.shape == (3, 4 + 64)
    codes = [data[:, 4:] >> shift & 3 for shift in (0, 2, 4, 6)]
    assert max(int(one.max()) for one in codes) == 2


def test_a_folder_of_masters_is_a_model_that_our_loader_takes(tmp_path: Path) -> None:
    write_bf16_folder(tmp_path / "tiny", TINY)
    backend = ReferenceBackend(torch.device("cpu"))
    model = load_model(tmp_path / "tiny", weights="dense", backend=backend, dtype=torch.bfloat16)
    assert model.config.num_layers == TINY.num_layers
    assert model.config.has_sub_norms


def test_rounds_are_taken_in_turns_and_told_as_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "llama-cpp-python" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(A_PEER.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(peers, "ModelProcess", OneSecondAStep)
    ours = ChildConfig("tiny", 2, "ternary", 16)
    peer = Peer("peer", "llama-cpp-python", ours, "TQ2_0", "F16", batches=False)
    figures = compare(peer, tmp_path, rounds=2)
    assert figures["version"] == "peer 1"
    assert "decode_8" not in figures
    assert figures["decode_1"]["ratio"] == {"median": 2.0, "min": 2.0, "max": 2.0, "n": 2}
    # 512 tokens take it 1024 s: what warms up counts, and no round follows.
    assert figures["prefill_512"]["theirs"] == {"median": 0.5, "min": 0.5, "max": 0.5, "n": 1}
    assert figures["prefill_512"]["ours"]["median"] == 512.0
    table = as_markdown([figures])
    assert "| peer | 0.5 → 1.0 (2.0×) | – | 0.5 → 128 (256.0×) |" in table


class OneSecondAStep:
    """A model of ours that takes a second for whatever is asked."""

    def __init__(self, config: ChildConfig) -> None:
        self.pid = os.getpid()
        self.model = type("Model", (), {"instruction_set": "none"})

    def measure(self, kind: str, count: int) -> object:
        return type("Measurement", (), {"seconds": 1.0})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
