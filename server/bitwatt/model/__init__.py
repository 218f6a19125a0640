"""Models: what they are, how they are built, and how a step runs.

Names are loaded when first used, so that reading a ModelConfig needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitwatt.checkpoints import load_model
    from bitwatt.model.random import random_model

__all__ = ["load_model", "random_model"]

_MODULES = {"load_model": "bitwatt.checkpoints", "random_model": "bitwatt.model.random"}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
