"""Runs transformers' BitNet without compiling its functions."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def eager_transformers() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield
