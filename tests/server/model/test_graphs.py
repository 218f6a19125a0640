"""CUDA graphs are captured by a fake torch.cuda: what they read must outlive the capture."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from bitwatt.model.graphs import DecodeGraphs, bucket_sizes
from bitwatt.model.kv_cache import KVCache
from bitwatt.model.prompt_graphs import PromptGraphs
from bitwatt.model.random_weights import random_model
from bitwatt.model.step_buffers import DeviceStep
from bitwatt_kernels.registry import choose_backend
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.factories import make_model_config

CPU = torch.device("cpu")


class Reads(TorchDispatchMode):
    """Notes the storages that are read and were not made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.kept: list[Tensor] = []  # so that no address is used twice
        self.read: dict[int, tuple[str, StorageWeakRef]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage.cdata not in self.made:
                    self.read.setdefault(storage.cdata, (str(func), storage))
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                cdata = tensor.untyped_storage()._cdata
                if cdata not in self.read:
                    self.made.add(cdata)
                    self.kept.append(tensor)
        return out


class FakeGraph:
    def replay(self) -> None:
        pass


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Reads]:
    captured: list[Reads] = []

    @contextmanager
    def graph(_: FakeGraph, pool: object = None) -> Iterator[None]:
        captured.append(Reads())
        assert not gc.isenabled()
        with captured[-1]:
            yield

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return captured


def test_all_that_a_graph_reads_lives_as_long_as_the_graphs(captures: list[Reads]) -> None:
    model = random_model(
        make_model_config(),
        weights="ternary",
        backend=choose_backend(CPU, "reference").backend,
        dtype=torch.float32,
        seed=0,
    )
    kv_cache = KVCache(model.config, 8, torch.float32, CPU)
    kv_cache.layers.zero_()
    step = DeviceStep(4, 16, 4, CPU)
    graphs = DecodeGraphs(model, kv_cache, step, max_num_seqs=4, max_model_len=64)
    prompts = PromptGraphs(
        model, kv_cache, step, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64
    )
    gc.collect()
    assert gc.isenabled()
    assert len(captures) == len(bucket_sizes(4)) + 1 == 4
    for capture in captures:
        assert len(capture.read) > 10
        assert [what for what, storage in capture.read.values() if storage.expired()] == []
    assert graphs.padded(3) == 4
    assert prompts.padded(3) == 16


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 64, 65, 256, 1000, 4096])
def test_buckets_hold_every_batch_and_sum_to_a_few_times_the_largest(max_num_seqs: int) -> None:
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_num_seqs
    for low, high in pairwise(sizes):
        assert high <= 2 * low
    assert sum(sizes) <= 8 * max_num_seqs
