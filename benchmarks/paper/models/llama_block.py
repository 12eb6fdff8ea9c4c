"""Blocks of today's language models: norm before attention and FFN, norm of queries and keys.

Sizes of Qwen3-0.6B: width 1024, 16 query and 8 key heads of 128, SwiGLU of 3072; two blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm

__all__ = ["LlamaBlocks", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    width: int = 1024
    heads: int = 16
    key_heads: int = 8
    head: int = 128
    hidden: int = 3072
    layers: int = 2
    batch: int = 4
    length: int = 512


def scaled(scale: float) -> Sizes:
    """Fewer and shorter sequences."""
    return Sizes(batch=max(1, int(4 * scale)), length=max(16, int(512 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states and what they should become."""
    shape = (sizes.batch, sizes.length, sizes.width)
    states, target = (torch.randn(shape, generator=random) for _ in range(2))
    return states, target


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [batch, heads, length, head]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, norm: MakeNorm, s: Sizes) -> None:
        super().__init__()
        self.head = s.head
        self.attention_norm, self.ffn_norm = norm(s.width), norm(s.width)
        self.q_norm, self.k_norm = norm(s.head), norm(s.head)
        self.q = nn.Linear(s.width, s.heads * s.head, bias=False)
        self.k, self.v = (nn.Linear(s.width, s.key_heads * s.head, bias=False) for _ in range(2))
        self.out = nn.Linear(s.heads * s.head, s.width, bias=False)
        self.gate, self.up = (nn.Linear(s.width, s.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(s.hidden, s.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.head)) for f in (self.q, self.k, self.v))
        q, k = (rotate(t.transpose(1, 2), cos, sin) for t in (self.q_norm(q), self.k_norm(k)))
        a = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class LlamaBlocks(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm, sizes) for _ in range(sizes.layers))
        self.norm = norm(sizes.width)
        rate = 10000.0 ** -(torch.arange(0, sizes.head, 2) / sizes.head)
        angle = torch.outer(torch.arange(sizes.length), rate)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, states: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance. The states get a gradient, as from the layers below in a stack."""
        states = states.detach().requires_grad_()
        for block in self.blocks:
            states = block(states, self.cos, self.sin)
        return F.mse_loss(self.norm(states), target)
