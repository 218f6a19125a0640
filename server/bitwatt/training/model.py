"""The models of the pair, in plain torch: BitNet b1.58 as in 2B4T, and a LLaMA of its size.

A third has the binary weights of the first BitNet in the shape of b1.58, all else alike.

Parameters carry the names that Hugging Face gives them, so a state dict is a checkpoint.
"""

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from bitwatt.training.ternary import BitLinear, binary_codes, ternary_codes

Architecture = Literal["ternary", "llama", "binary"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a model; both architectures read all of them."""

    architecture: Architecture
    vocab_size: int = 4096
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 64
    max_position: int = 1024
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5

    def as_dict(self) -> dict[str, object]:
        """Return the fields by name, fit for JSON."""
        return asdict(self)


SIZES: dict[str, ModelConfig] = {
    "2M": ModelConfig(
        "ternary", hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2
    ),
    "6M": ModelConfig(
        "ternary", hidden_size=256, intermediate_size=768, num_layers=6, num_heads=4, num_kv_heads=2
    ),
    "13M": ModelConfig("ternary"),
}
"""Shapes by about how many parameters they have; every width is a multiple of 256."""

DEFAULT_SIZE = "13M"
DEFAULT_LEARNING_RATES: dict[Architecture, float] = {
    "ternary": 1.6e-2,
    "llama": 8e-3,
    "binary": 1.6e-2,
}
"""The best of four each, doubling from 2e-3 and 1e-3, after 0.6M tokens at 6M parameters.

Of binary weights none was tried.
"""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + epsilon) · weight, in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon) * self.weight


def _linear(config: ModelConfig, in_features: int, out_features: int) -> nn.Module:
    if config.architecture == "llama":
        return nn.Linear(in_features, out_features, bias=False)
    codes = ternary_codes if config.architecture == "ternary" else binary_codes
    return BitLinear(in_features, out_features, codes)


def _sub_norm(config: ModelConfig, size: int) -> nn.Module | None:
    """The norm before an output projection, which a LLaMA has none of."""
    return None if config.architecture == "llama" else RMSNorm(size, config.norm_epsilon)


class Context(NamedTuple):
    """Where the tokens of a batch stand; the same for every layer.

    cos, sin   [batch, 1, length, head_dim / 2] float32, of the angles of every position
    mask       [batch, 1, length, length] float32: 0 where a token may look, −inf elsewhere
    """

    cos: torch.Tensor
    sin: torch.Tensor
    mask: torch.Tensor


class Attention(nn.Module):
    """Causal grouped-query attention with half-split rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = _linear(config, config.hidden_size, width)
        self.k_proj = _linear(config, config.hidden_size, kv_width)
        self.v_proj = _linear(config, config.hidden_size, kv_width)
        self.o_proj = _linear(config, width, config.hidden_size)
        self.attn_sub_norm = _sub_norm(config, width)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        batch, length, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:  # [batch, heads, length, head_dim]
            return projected.view(batch, length, -1, self.config.head_dim).transpose(1, 2)

        q = _rotate(heads(self.q_proj(x)), context)
        k = _rotate(heads(self.k_proj(x)), context)
        y = _attention(q, k, heads(self.v_proj(x)), context.mask)
        y = y.transpose(1, 2).reshape(batch, length, -1)
        if self.attn_sub_norm is not None:
            y = self.attn_sub_norm(y)
        projected: torch.Tensor = self.o_proj(y)
        return projected


class MLP(nn.Module):
    """down(act(gate) · up): act is relu² with a norm before `down`, SiLU in LLaMA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config, config.intermediate_size, config.hidden_size)
        self.ffn_sub_norm = _sub_norm(config, config.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.ffn_sub_norm is not None:
            hidden = self.ffn_sub_norm(gate.relu().square() * up)
        else:
            hidden = F.silu(gate) * up
        projected: torch.Tensor = self.down_proj(hidden)
        return projected


class Block(nn.Module):
    """A layer: attention, then the MLP, each on a normed input and added to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context)
        y: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return y


class _Body(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)


class LanguageModel(nn.Module):
    """A causal language model with tied embeddings, initialized from `seed` alone."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self._initialize(torch.Generator().manual_seed(seed))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, length, vocab_size] from tokens [batch, length] int64."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return F.linear(self.hidden(tokens, positions), self.model.embed_tokens.weight)

    def hidden(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return what the head multiplies, [batch, length, hidden_size] float32.

        tokens      [batch, length] int64, documents one after another
        positions   [batch, length] int64, each token's place in its document. A document begins
                    where it is 0, and its tokens look at one another alone
        """
        x = self.model.embed_tokens(tokens)
        context = _context(self.config, positions)
        for block in self.model.layers:
            x = block(x, context)
        normed: torch.Tensor = self.model.norm(x)
        return normed

    def num_parameters(self) -> int:
        """Return how many parameters there are, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialize(self, generator: torch.Generator) -> None:
        output_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = output_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)


def _context(config: ModelConfig, positions: torch.Tensor) -> Context:
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device) / config.head_dim
    angles = positions[:, None, :, None].float() * config.rope_theta**-exponents
    document = (positions == 0).cumsum(dim=1)
    is_same = document[:, :, None] == document[:, None, :]  # [batch, length, length]
    can_see = is_same & torch.ones_like(is_same[0]).tril()
    mask = torch.zeros_like(can_see, dtype=torch.float32).masked_fill(~can_see, -torch.inf)
    return Context(angles.cos(), angles.sin(), mask[:, None])


def _rotate(x: torch.Tensor, context: Context) -> torch.Tensor:
    """Return x [batch, heads, length, head_dim] with its first half rotated against its second."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = context.cos, context.sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Return softmax(q @ k.T / sqrt(head_dim) + mask) @ v, a group of query heads to a KV head.

    The scores are written out, for the compiler to join with what is around them: in windows of 64
    tokens their products take 4% of a step (6M parameters, bfloat16 on a Zen 4).
    """
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads = k.shape[1]
    grouped = q.reshape(batch, num_kv_heads, -1, head_dim)  # the group's queries as rows
    scores = (grouped @ k.transpose(-1, -2)).float().view(batch, num_kv_heads, -1, length, length)
    odds = (scores * head_dim**-0.5 + mask[:, :, None]).softmax(dim=-1)
    y = odds.view(batch, num_kv_heads, -1, length) @ v.to(odds.dtype)
    attended: torch.Tensor = y.view(batch, num_heads, length, head_dim)
    return attended
