"""The two models of the pair, in plain torch: BitNet b1.58 as in 2B4T, and a LLaMA of its size.

Parameters carry the names that Hugging Face gives them, so a state dict is a checkpoint.
"""

from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from bitwatt.training.ternary import BitLinear

Architecture = Literal["ternary", "llama"]


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
    if config.architecture == "ternary":
        return BitLinear(in_features, out_features)
    return nn.Linear(in_features, out_features, bias=False)


def _sub_norm(config: ModelConfig, size: int) -> nn.Module | None:
    """The norm before an output projection, which only the ternary model has."""
    return RMSNorm(size, config.norm_epsilon) if config.architecture == "ternary" else None


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

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:  # [batch, heads, length, head_dim]
            return projected.view(batch, length, -1, self.config.head_dim).transpose(1, 2)

        q = _rotate(heads(self.q_proj(x)), cos, sin)
        k = _rotate(heads(self.k_proj(x)), cos, sin)
        v = heads(self.v_proj(x)).float()
        group = self.config.num_heads // self.config.num_kv_heads
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, length, -1)
        if self.attn_sub_norm is not None:
            y = self.attn_sub_norm(y)
        projected: torch.Tensor = self.o_proj(y)
        return projected


class MLP(nn.Module):
    """down(act(gate) · up): act is relu² with a norm before `down` in ternary, SiLU in LLaMA."""

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

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
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
        x = self.model.embed_tokens(tokens)
        cos, sin = _rotary_table(self.config, tokens.shape[1], tokens.device)
        for block in self.model.layers:
            x = block(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats a token, a float32 scalar."""
        logits = self(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def num_parameters(self) -> int:
        """Return how many parameters there are, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _initialize(self, generator: torch.Generator) -> None:
        output_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = output_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)


def _rotary_table(
    config: ModelConfig, length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of every position's angles, each [length, head_dim / 2] float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=device) / config.head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), config.rope_theta**-exponents)
    return angles.cos(), angles.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x [..., length, head_dim] with its first half rotated against its second."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
