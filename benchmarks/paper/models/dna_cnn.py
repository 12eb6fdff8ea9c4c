"""DNA classification by a residual 1-D CNN: convolutions along the sequence, norms over channels.

Activations stay [batch, position, channel], where a position's channels are a contiguous row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm

__all__ = ["DnaCNN", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    channels: int = 128
    layers: int = 6
    kernel: int = 11
    length: int = 400
    classes: int = 3
    batch: int = 32


def scaled(scale: float) -> Sizes:
    """Fewer sequences."""
    return Sizes(batch=max(1, int(32 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bases 0 ... 3 and classes."""
    bases = torch.randint(4, (sizes.batch, sizes.length), generator=random)
    return bases, torch.randint(sizes.classes, (sizes.batch,), generator=random)


class Block(nn.Module):
    """x + convolution(gelu(norm(x))), dilated."""

    def __init__(self, norm: MakeNorm, channels: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.convolution = nn.Conv1d(channels, channels, kernel, padding="same", dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.norm(x))
        return x + self.convolution(h.transpose(1, 2)).transpose(1, 2)


class DnaCNN(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        n = sizes.channels
        self.bases = nn.Embedding(4, n)
        self.first = nn.Conv1d(n, n, sizes.kernel, padding="same")
        self.blocks = nn.Sequential(
            *(Block(norm, n, sizes.kernel, 2 ** (i % 3)) for i in range(sizes.layers))
        )
        self.norm = norm(n)
        self.classes = nn.Linear(n, sizes.classes)

    def logits(self, bases: Tensor) -> Tensor:
        x = self.first(self.bases(bases).transpose(1, 2)).transpose(1, 2).contiguous()
        return self.classes(self.norm(self.blocks(x)).amax(1))

    def forward(self, bases: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(bases), classes)
