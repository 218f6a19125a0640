"""A GGUF file is a model wherever a folder is one: for LLM, the command and the engine."""

import json
from pathlib import Path

import pytest
from bitwatt import LLM, SamplingParams, builtin
from bitwatt.application import models_to_serve
from bitwatt.cli import main
from bitwatt.engine.build import build_engine
from bitwatt.engine.messages import EngineConfig
from bitwatt.errors import CheckpointError
from bitwatt.evaluation.perplexity import score_texts
from bitwatt.inspection import inspect

from tests.fakes import make_settings
from tests.server.checkpoints.embedded_gguf import write_embedded

pytestmark = pytest.mark.slow

GREEDY = SamplingParams(temperature=0, max_tokens=24)
PROMPTS = ["def main(", "import textwrap\n\n  x = '12345'", "Größe 🙂"]
MESSAGES = [{"role": "user", "content": "What does textwrap.dedent do?"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_embedded(path)
    return path


@pytest.mark.parametrize("weights", ["ternary", "dense"])
def test_the_embedded_model_answers_the_same_from_a_gguf_file(path: Path, weights: str) -> None:
    with (
        LLM(builtin.TERNARY, weights=weights, kv_cache_bytes=2**26) as folder,
        LLM(path, weights=weights, kv_cache_bytes=2**26) as file,
    ):
        assert file.generate(PROMPTS, GREEDY) == folder.generate(PROMPTS, GREEDY)
        assert file.chat(MESSAGES, GREEDY) == folder.chat(MESSAGES, GREEDY)
        assert file.info.eos_token_ids == folder.info.eos_token_ids == [1, 2]
        assert file.info.memory == folder.info.memory
        scored = [score_texts(*of, PROMPTS, 8) for of in ((file, path), (folder, builtin.TERNARY))]
        assert scored[0] == scored[1]


def test_a_file_is_converted_to_a_folder_that_answers_the_same(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(path), str(folder), "--to", "hf"])
    assert exit_.value.code == 0
    with (
        LLM(folder, kv_cache_bytes=2**26) as converted,
        LLM(path, kv_cache_bytes=2**26) as file,
    ):
        assert converted.generate(PROMPTS, GREEDY) == file.generate(PROMPTS, GREEDY)
        assert converted.chat(MESSAGES, GREEDY) == file.chat(MESSAGES, GREEDY)


def test_a_file_is_inspected(path: Path) -> None:
    found = inspect(path)
    assert found["stored_as"] == "I2_S; W = t · scale"
    assert found["file_bytes"] == path.stat().st_size
    assert found["refused"] == []
    assert {matrix["scales"] for matrix in found["matrices"]} == {"tensor"}


def test_a_file_is_served_by_its_name_without_the_ending(path: Path, tmp_path: Path) -> None:
    [only] = models_to_serve(make_settings(path=path))
    assert (only.name, only.path) == ("tiny", path)
    link = tmp_path / "linked.gguf"  # as a cache has it, to a file without an ending
    link.symlink_to(path)
    [only] = models_to_serve(make_settings(path=link))
    assert (only.name, only.path) == ("linked", link)


def test_the_fake_engine_has_a_files_vocabulary(path: Path) -> None:
    core, info = build_engine(EngineConfig(model_path=str(path), weights="dense", backend="fake"))
    core.close()
    assert (
        info.vocab_size == json.loads((builtin.TERNARY / "config.json").read_text())["vocab_size"]
    )


def test_a_file_that_is_none_is_refused_before_anything_is_loaded(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML" + bytes(100))
    with pytest.raises(CheckpointError, match="is no GGUF file: it begins with b'GGML'"):
        LLM(tmp_path / "x.gguf")
    with pytest.raises(SystemExit) as exit_:
        main(["serve", str(tmp_path / "x.gguf"), "--port", "0"])
    assert exit_.value.code == 1
