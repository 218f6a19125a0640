"""Damaged folders end in one typed line, in little memory, whatever is damaged in them."""

import os
from pathlib import Path
from random import Random

import pytest
import torch
from bitwatt.checkpoints.registry import load_model
from bitwatt.errors import CheckpointError
from bitwatt_kernels.registry import choose_backend

from tests.server.checkpoints.corruption import (
    Files,
    corrupt_folders,
    good_files,
    mutate,
    peak_bytes,
    reset_peak,
    write,
)

NUM_MUTATIONS = 20_000 if os.environ.get("BITWATT_TEST_ALL") == "1" else 400
SPARE_BYTES = 64 << 20
BACKEND = choose_backend(torch.device("cpu"), "torch").backend


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return good_files(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return good_files(tmp_path_factory.mktemp("sharded"), is_sharded=True)


def load_within_limits(folder: Path, files: Files) -> str | None:
    """Return why the folder is refused, or None where it's served."""
    write(folder, files)
    reset_peak()
    before = peak_bytes()
    model_bytes = 0
    try:
        model = load_model(folder, weights="ternary", backend=BACKEND, dtype=torch.bfloat16)
    except CheckpointError as error:
        refusal = str(error)
        assert refusal.startswith(str(folder)) or "--weights" in refusal
        assert "\n" not in refusal
        assert len(refusal) < len(str(folder)) + 400
    else:
        refusal = None
        memory = model.memory()
        model_bytes = memory.other_weights_bytes + memory.embedding_bytes  # the rotary table's too
    limit = sum(map(len, files.values())) + SPARE_BYTES + 2 * model_bytes
    assert peak_bytes() - before <= limit
    return refusal


@pytest.mark.parametrize("form", ["plain", "sharded"])
def test_an_undamaged_folder_is_served(
    tmp_path: Path, form: str, request: pytest.FixtureRequest
) -> None:
    assert load_within_limits(tmp_path, request.getfixturevalue(form)) is None


def test_every_corrupt_folder_is_refused_in_one_typed_line(
    tmp_path: Path, plain: Files, sharded: Files
) -> None:
    cases = list(corrupt_folders(plain, sharded))
    assert len({what for what, _ in cases}) == len(cases) >= 173
    served = [what for what, files in cases if load_within_limits(tmp_path / "m", files) is None]
    assert served == []


@pytest.mark.slow(80)
@pytest.mark.timeout(900)
def test_mutated_files_are_refused_in_one_typed_line_or_served(
    tmp_path: Path, plain: Files, sharded: Files
) -> None:
    random = Random(1)
    num_refused = 0
    for i in range(NUM_MUTATIONS):
        form = i % 2
        name, files = mutate(random, (plain, sharded)[form])
        try:
            num_refused += load_within_limits(tmp_path / f"{form}", files) is not None
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise AssertionError(f"mutation {i}, of {name}: {error!r}") from error
    assert num_refused > NUM_MUTATIONS // 3
