"""Transformer base (Vaswani et al. 2017): d 512, FFN 2048, 6 + 6 layers, 8 heads, post-norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm

__all__ = ["Attention", "Layer", "Sizes", "Transformer", "batch", "positions", "scaled"]


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 32000
    width: int = 512
    hidden: int = 2048
    layers: int = 6
    heads: int = 8
    batch: int = 32
    length: int = 50


def scaled(scale: float) -> Sizes:
    """Fewer sentences and a smaller vocabulary; width, depth and length as they are."""
    return Sizes(vocabulary=max(100, int(32000 * scale)), batch=max(1, int(32 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source and target words."""
    shape = (sizes.batch, sizes.length)
    source, target = (torch.randint(sizes.vocabulary, shape, generator=random) for _ in range(2))
    return source, target


def positions(length: int, width: int) -> Tensor:
    """Sinusoids, [length, width]."""
    rate = torch.exp(torch.arange(0, width, 2) * (-9.21 / width))  # 1 ... 1 / 10000
    angle = torch.arange(length).unsqueeze(1) * rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


class Attention(nn.Module):
    """Multi-head attention of x to y."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, y: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.q(x), self.k(y), self.v(y))
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(a.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Self-attention, attention to the encoder (in the decoder), FFN; each: norm(x + f(x))."""

    def __init__(
        self, norm: MakeNorm, width: int, hidden: int, heads: int, *, decoder: bool, cross: bool
    ) -> None:
        super().__init__()
        self.causal = decoder
        self.attention, self.attention_norm = Attention(width, heads), norm(width)
        self.cross = Attention(width, heads) if cross else None
        self.cross_norm = norm(width) if cross else None
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.ffn_norm = norm(width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.attention_norm(x + self.attention(x, x, self.causal))
        if self.cross is not None and self.cross_norm is not None:
            x = self.cross_norm(x + self.cross(x, memory))
        return self.ffn_norm(x + self.ffn(x))


class Transformer(nn.Module):
    positions: Tensor

    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        self.width = sizes.width
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width)  # shared by all three uses
        nn.init.normal_(self.embedding.weight, std=sizes.width**-0.5)
        shape = (sizes.width, sizes.hidden, sizes.heads)
        self.encoder = nn.ModuleList(
            Layer(norm, *shape, decoder=False, cross=False) for _ in range(sizes.layers)
        )
        self.decoder = nn.ModuleList(
            Layer(norm, *shape, decoder=True, cross=True) for _ in range(sizes.layers)
        )
        self.register_buffer("positions", positions(sizes.length, sizes.width), persistent=False)

    def embed(self, words: Tensor) -> Tensor:
        return self.embedding(words) * self.width**0.5 + self.positions[: words.size(1)]

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy of each target word from those before it."""
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.embed(target[:, :-1])
        for layer in self.decoder:
            x = layer(x, memory)
        logits = F.linear(x, self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten())
