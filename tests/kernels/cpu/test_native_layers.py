"""Layers of the native backend in one call: their operations, on any number of threads."""

from dataclasses import replace

import pytest
import torch
from bitwatt_kernels.cpu.native_backend import NativeBackend
from bitwatt_kernels.errors import DtypeError, KernelError, ShapeError
from bitwatt_kernels.layer import LayersByOperations
from bitwatt_kernels.reference.attention import rope_table

from tests.kernels.cpu.conftest import make_native
from tests.kernels.cpu.factories import make_cache, make_layer, make_layout

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
}
STEPS = {
    "one-token": ([700], [1]),
    "decode": ([1, 300, 33], [1, 1, 1]),
    "chunk": ([40, 90], [40, 17]),
}


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("step", STEPS)
def test_layers_are_their_operations_on_any_number_of_threads(
    native: NativeBackend, step: str, group: int | None
) -> None:
    weights = [make_layer(native, **SIZES, group=group, seed=20 * i) for i in range(3)]
    layout, num_blocks = make_layout(*STEPS[step])
    rope = rope_table(1024, 64, 5e5)
    empty = torch.stack([make_cache(num_blocks, 2, 64, torch.bfloat16, seed=i) for i in range(3)])
    expected_caches = empty.clone()
    h = torch.randn(len(layout.positions), 192).bfloat16()
    expected = LayersByOperations.ternary_layers(
        native, h, tuple(weights), rope, expected_caches, layout
    )
    for num_threads in (1, 2, 3, 7):
        backend = make_native(instruction_set=native.instruction_set, num_threads=num_threads)
        own = [make_layer(backend, **SIZES, group=group, seed=20 * i) for i in range(3)]
        layers = backend.prepare_layers(own)
        caches = empty.clone()
        for _ in range(5):  # the same step again writes the same cache
            computed = backend.ternary_layers(h, layers, rope, caches, layout)
            assert torch.equal(computed, expected), num_threads
        assert torch.equal(caches, expected_caches), num_threads


def test_a_layer_whose_parts_do_not_fit_is_refused(native: NativeBackend) -> None:
    layer = make_layer(native, **SIZES)
    other = make_layer(native, **(SIZES | {"intermediate_size": 128}))
    for wrong in (replace(layer, down=other.down), replace(layer, num_heads=3)):
        with pytest.raises(ShapeError, match="don't make a layer"):
            native.prepare_layers([wrong])
    with pytest.raises(ShapeError, match="several shapes"):
        native.prepare_layers([layer, make_layer(native, **(SIZES | {"num_kv_heads": 4}))])
    with pytest.raises(DtypeError, match="norms are float32"):
        native.prepare_layers([replace(layer, mlp_norm=layer.mlp_norm.bfloat16())])


def test_a_step_that_does_not_fit_is_refused(native: NativeBackend) -> None:
    layers = native.prepare_layers([make_layer(native, **SIZES)])
    layout, num_blocks = make_layout([20], [1])
    rope = rope_table(64, 64, 5e5)
    caches = make_cache(num_blocks, 2, 64, torch.bfloat16)[None]
    h = torch.randn(1, 192).bfloat16()
    with pytest.raises(ShapeError, match="hidden_size 192"):
        native.ternary_layers(h[:, :64].contiguous(), layers, rope, caches, layout)
    with pytest.raises(ShapeError, match="the 1 layers"):
        native.ternary_layers(h, layers, rope, caches.repeat(2, 1, 1, 1, 1, 1), layout)
    layout.slots[0] = num_blocks * 16
    with pytest.raises(KernelError, match="slot"):
        native.ternary_layers(h, layers, rope, caches, layout)
