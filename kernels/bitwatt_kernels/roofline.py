"""The least time a step can take: what it must read, multiply and launch, and nothing else."""

from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Gpu", "ModelSizes", "Op", "StepCost", "Weights", "linear", "step"]

Weights = Literal["ternary", "dense"]
"""Packed at two bits a weight, multiplied in int8; or bfloat16, multiplied in bfloat16."""

# Kernels a layer takes, beside its four matmuls and attention: two norms, RoPE with the cache,
# the gated activation, and the quantization of attention's output where weights are ternary.
_SMALL_KERNELS: dict[Weights, int] = {"ternary": 5, "dense": 4}
_FEW_TOKENS = 256  # up to which ternary linears take these into their own kernels
_SMALL_KERNELS_OF_MANY = 2  # above, in a step that decodes: two linears still take theirs


def _num_small_kernels(weights: Weights, num_tokens: int, new_tokens: int) -> int:
    if weights == "dense":
        return _SMALL_KERNELS[weights]
    decodes = new_tokens == 1  # else RoPE comes, with the cache, before prefill's attention
    if num_tokens <= _FEW_TOKENS:
        return 0 if decodes else 1
    return _SMALL_KERNELS_OF_MANY if decodes else _SMALL_KERNELS[weights]


@dataclass(frozen=True, slots=True)
class Gpu:
    """What one GPU sustains; take measured figures to compare measurements with.

    bandwidth_bytes_s  bytes a second to and from its memory
    int8_ops_s         int8 multiplies and adds a second on its tensor cores, dense
    bf16_ops_s         bfloat16 multiplies and adds a second, likewise
    kernel_s           seconds that a kernel costs beyond its work, in a CUDA graph
    """

    bandwidth_bytes_s: float
    int8_ops_s: float
    bf16_ops_s: float
    kernel_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a decoder-only transformer that decide its cost."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """A layer's matmuls by name, as (out_features, in_features), fused as they are run."""
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "qkv": (heads + 2 * kv_heads, self.hidden_size),
            "o": (self.hidden_size, heads),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of every layer's matmuls: those that are ternary."""
        return self.num_layers * sum(n * k for n, k in self.linear_shapes.values())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in a 16-bit cache."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * 2


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel, or num_kernels alike: the bytes it moves and the arithmetic it does."""

    name: str
    weight_bytes: float = 0.0
    other_bytes: float = 0.0
    int8_ops: float = 0.0
    bf16_ops: float = 0.0
    num_kernels: int = 1

    def floor_s(self, gpu: Gpu) -> float:
        """Return the seconds of its slower half, memory or arithmetic, and of its launches."""
        memory_s = (self.weight_bytes + self.other_bytes) / gpu.bandwidth_bytes_s
        arithmetic_s = self.int8_ops / gpu.int8_ops_s + self.bf16_ops / gpu.bf16_ops_s
        return max(memory_s, arithmetic_s) + self.num_kernels * gpu.kernel_s


@dataclass(frozen=True, slots=True)
class StepCost:
    """The kernels of one step of a model."""

    ops: tuple[Op, ...]

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights read, the head's included."""
        return sum(op.weight_bytes for op in self.ops)

    @property
    def num_bytes(self) -> float:
        """Bytes moved: weights, keys and values, activations."""
        return sum(op.weight_bytes + op.other_bytes for op in self.ops)

    @property
    def num_operations(self) -> float:
        """Multiplies and adds."""
        return sum(op.int8_ops + op.bf16_ops for op in self.ops)

    @property
    def num_kernels(self) -> int:
        """Kernels launched."""
        return sum(op.num_kernels for op in self.ops)

    def floor_s(self, gpu: Gpu) -> float:
        """Return the least seconds of the step: its kernels one after another."""
        return sum(op.floor_s(gpu) for op in self.ops)


def linear(
    name: str,
    num_tokens: int,
    out_features: int,
    in_features: int,
    weights: Weights,
    num_kernels: int = 1,
) -> Op:
    """Return the cost of num_kernels matmuls of one shape, activations in, 16-bit results out."""
    operations = 2.0 * num_tokens * out_features * in_features * num_kernels
    parameters = float(out_features * in_features * num_kernels)
    ternary = weights == "ternary"
    inputs = num_tokens * in_features * (1 if ternary else 2)
    return Op(
        name,
        weight_bytes=parameters / 4 if ternary else parameters * 2,
        other_bytes=float(num_kernels * (inputs + num_tokens * out_features * 2)),
        int8_ops=operations if ternary else 0.0,
        bf16_ops=0.0 if ternary else operations,
        num_kernels=num_kernels,
    )


def step(
    sizes: ModelSizes,
    weights: Weights,
    *,
    num_sequences: int,
    context_tokens: int,
    new_tokens: int = 1,
    head_bits: Literal[8, 16] = 16,
    is_persistent: bool = False,
) -> StepCost:
    """Return the cost of a step that gives each sequence new_tokens more, up to context_tokens.

    context_tokens  tokens of a sequence after the step, all read once from a 16-bit cache
    new_tokens      1 decodes; more prefill, with causal attention
    head_bits       of a head's weight; it is multiplied for the last token of a sequence alone
    is_persistent   all layers are one kernel; what its programs wait for one another isn't counted
    """
    num_tokens = num_sequences * new_tokens
    ops = [
        linear(name, num_tokens, n, k, weights, sizes.num_layers)
        for name, (n, k) in sizes.linear_shapes.items()
    ]
    attended = new_tokens * (context_tokens - (new_tokens - 1) / 2)  # pairs of query and key
    head_parameters = float(sizes.vocab_size * sizes.hidden_size)
    ops += [
        Op(
            "attention",
            other_bytes=float(num_sequences * context_tokens * sizes.kv_bytes_per_token),
            bf16_ops=4.0
            * num_sequences
            * attended
            * (sizes.num_heads * sizes.head_dim * sizes.num_layers),
            num_kernels=sizes.num_layers,
        ),
        Op(
            "norms, RoPE, activation",
            num_kernels=sizes.num_layers * _num_small_kernels(weights, num_tokens, new_tokens),
        ),
    ]
    if is_persistent:
        ops = [replace(op, num_kernels=0) for op in ops]
    ops += [
        Op("embedding, last norm", num_kernels=2 + is_persistent),
        Op(
            "head",
            weight_bytes=head_parameters * head_bits / 8,
            other_bytes=float(num_sequences * sizes.vocab_size * 4),
            int8_ops=2 * num_sequences * head_parameters if head_bits == 8 else 0.0,
            bf16_ops=2 * num_sequences * head_parameters if head_bits == 16 else 0.0,
        ),
    ]
    return StepCost(tuple(ops))
