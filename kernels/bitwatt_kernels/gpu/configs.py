"""Launch configurations as data: one JSON file a GPU in tuned/, read once and never searched."""

import json
from dataclasses import asdict, dataclass, field, replace
from importlib.resources import files
from typing import Any

from bitwatt_kernels.errors import BackendError

__all__ = [
    "AttentionConfig",
    "AttentionTile",
    "DenseConfig",
    "LinearConfig",
    "TunedConfigs",
    "gpu_slug",
    "load",
]


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How ternary_linear is launched for up to max_tokens tokens; no choice changes its result.

    max_tokens      tokens this entry serves, or None for any number
    block_out       output features of a tile
    block_tokens    tokens of a tile
    block_bytes     packed bytes of a row read in one step of the loop: 4 · block_bytes weights
    num_splits      programs that share a tile's reduction, or None to fill the GPU
    split_planes    use two accumulators: one for the planes whose codes come out as they are, one
                    for those whose codes come out four times as large (see linear.py). True takes
                    fewer instructions a weight, and twice the registers for sums
    bfloat16        multiply codes as bfloat16, where tensor cores have no fast int8: the same sums,
                    for up to most_exact_features
    """

    max_tokens: int | None
    block_out: int
    block_tokens: int
    block_bytes: int
    num_warps: int
    num_stages: int
    num_splits: int | None = None
    split_planes: bool = True
    bfloat16: bool = False

    @property
    def most_exact_features(self) -> int:
        """Features of a row up to which float32 sums of codes are exact, in whatever order.

        A sum of K products is at most 2 · 128 · K, and 8 · 128 · K / 2 of planes that are four
        times their codes; float32 holds whole numbers up to 2²⁴.
        """
        return 2**24 // (512 if self.split_planes else 256)


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """A tile of attention: its rows are tokens of a step times heads of a group."""

    block_rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """How attention is launched. split_tokens and block_context fix the order of its sums.

    split_tokens   context tokens reduced together before splits are merged
    block_context  context tokens a step of the loop reads; divides split_tokens
    decode         tile where every sequence brings one token
    prefill        tile otherwise; as many rows a warp as decode's, or results may differ in bits
    """

    split_tokens: int
    block_context: int
    decode: AttentionTile
    prefill: AttentionTile

    @property
    def prefill_of_codes(self) -> AttentionTile:
        """prefill over keys and values in int8, for whose scales 4 warps lack the registers."""
        return replace(self.prefill, num_warps=max(8, self.prefill.num_warps))


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """How the fixed-order 16-bit matmul and the int8 head are launched for up to max_tokens."""

    max_tokens: int | None
    block_out: int
    block_tokens: int
    block_in: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class TunedConfigs:
    """Every launch configuration of one GPU model.

    gpu      name as the driver gives it, or a generation such as "sm_90"
    source   where the figures come from, in words
    pdl      launch kernels with programmatic dependent launch (compute capability 9.0 and later)
    linear   by rising max_tokens, the last one open
    shapes   overrides of linear by "out_features x in_features", such as "2560x6912"
    """

    gpu: str
    source: str
    pdl: bool
    linear: tuple[LinearConfig, ...]
    dense: tuple[DenseConfig, ...]
    attention: AttentionConfig
    shapes: dict[str, tuple[LinearConfig, ...]] = field(default_factory=dict)

    def for_linear(self, num_tokens: int, out_features: int, in_features: int) -> LinearConfig:
        """Return the entry of the shape, or else of every shape, that serves num_tokens."""
        regimes = self.shapes.get(f"{out_features}x{in_features}", self.linear)
        return next(c for c in regimes if c.max_tokens is None or num_tokens <= c.max_tokens)

    def for_dense(self, num_tokens: int) -> DenseConfig:
        """Return the entry that serves num_tokens."""
        return next(c for c in self.dense if c.max_tokens is None or num_tokens <= c.max_tokens)

    def to_json(self) -> str:
        """Return the text of this GPU's file in tuned/."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "TunedConfigs":
        """Return what to_json wrote. Raises BackendError if no entry serves every token count."""
        data: dict[str, Any] = json.loads(text)
        data["linear"] = tuple(LinearConfig(**c) for c in data["linear"])
        data["dense"] = tuple(DenseConfig(**c) for c in data["dense"])
        attention = data["attention"]
        attention["decode"] = AttentionTile(**attention["decode"])
        attention["prefill"] = AttentionTile(**attention["prefill"])
        data["attention"] = AttentionConfig(**attention)
        data["shapes"] = {
            shape: tuple(LinearConfig(**c) for c in regimes)
            for shape, regimes in data["shapes"].items()
        }
        configs = cls(**data)
        limits = [[c.max_tokens for c in regimes] for regimes in configs.shapes.values()]
        limits += [[c.max_tokens for c in configs.linear], [c.max_tokens for c in configs.dense]]
        if any(not serves or serves[-1] is not None for serves in limits):
            raise BackendError(
                f"launch configurations of {configs.gpu!r} don't serve every number of tokens: "
                "the last entry of a list must have max_tokens null"
            )
        return configs


def gpu_slug(gpu: str) -> str:
    """Return the file name, without suffix, of a GPU's launch configurations."""
    return "-".join(gpu.lower().replace("/", " ").split())


def load(gpu: str, capability: tuple[int, int]) -> TunedConfigs:
    """Return the launch configurations tuned for a GPU model, or its generation's defaults.

    10.x and 11.x get sm_100's. 12.x, a generation of desktop cards, gets sm_80's: it has the shared
    memory of 8.6 and 8.9, and sm_90's attention tiles spill there.
    """
    folder = files("bitwatt_kernels") / "tuned"
    tuned = folder / f"{gpu_slug(gpu)}.json"
    if not tuned.is_file():
        generation = {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(capability[0], "sm_80")
        tuned = folder / f"{generation}.json"
    return TunedConfigs.from_json(tuned.read_text())
