"""Vision transformer (Dosovitskiy et al. 2021), ViT-S/16: width 384, 6 heads, 197 tokens.

Four of its twelve blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm
from .transformer import Attention

__all__ = ["Sizes", "VisionTransformer", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    width: int = 384
    heads: int = 6
    layers: int = 4
    image: int = 224
    patch: int = 16
    colours: int = 3
    classes: int = 1000
    batch: int = 16


def scaled(scale: float) -> Sizes:
    """Fewer images."""
    return Sizes(batch=max(1, int(16 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    shape = (sizes.batch, sizes.colours, sizes.image, sizes.image)
    images = torch.randn(shape, generator=random)
    return images, torch.randint(sizes.classes, (sizes.batch,), generator=random)


class Block(nn.Module):
    def __init__(self, norm: MakeNorm, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(width), Attention(width, heads)
        self.ffn_norm = norm(width)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.attention(h, h)
        return x + self.ffn(self.ffn_norm(x))


class VisionTransformer(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        n = sizes.width
        self.patches = nn.Conv2d(sizes.colours, n, sizes.patch, sizes.patch)
        self.first = nn.Parameter(torch.zeros(1, 1, n))
        tokens = (sizes.image // sizes.patch) ** 2 + 1
        self.positions = nn.Parameter(0.02 * torch.randn(1, tokens, n))
        self.blocks = nn.Sequential(*(Block(norm, n, sizes.heads) for _ in range(sizes.layers)))
        self.norm = norm(n)
        self.classes = nn.Linear(n, sizes.classes)

    def logits(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.size(0), -1, -1), x], 1) + self.positions
        return self.classes(self.norm(self.blocks(x))[:, 0])

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(images), classes)
