"""Diffusion transformer (Peebles and Xie 2023), DiT-S/2: norms without weight, modulated.

Four of its twelve blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm
from .transformer import Attention

__all__ = ["DiffusionTransformer", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    width: int = 384
    heads: int = 6
    layers: int = 4
    latent: int = 4 * 2 * 2  # 2 x 2 patches of 4 channels
    tokens: int = 256
    batch: int = 16


def scaled(scale: float) -> Sizes:
    """Fewer images."""
    return Sizes(batch=max(1, int(16 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, the noise in them, the condition (time and class, embedded)."""
    shape = (sizes.batch, sizes.tokens, sizes.latent)
    noisy, noise = (torch.randn(shape, generator=random) for _ in range(2))
    return noisy, noise, torch.randn(sizes.batch, sizes.width, generator=random)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class Block(nn.Module):
    def __init__(self, norm: MakeNorm, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (norm(width, affine=False) for _ in range(2))
        self.attention = Attention(width, heads)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(F.silu(condition)).unsqueeze(1).chunk(6, -1)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = parts
        h = modulate(self.attention_norm(x), shift, scale)
        x = x + gate * self.attention(h, h)
        return x + ffn_gate * self.ffn(modulate(self.ffn_norm(x), ffn_shift, ffn_scale))


class DiffusionTransformer(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        n = sizes.width
        self.latents = nn.Linear(sizes.latent, n)
        self.positions = nn.Parameter(0.02 * torch.randn(1, sizes.tokens, n))
        self.blocks = nn.ModuleList(Block(norm, n, sizes.heads) for _ in range(sizes.layers))
        self.norm = norm(n, affine=False)
        self.out = nn.Linear(n, sizes.latent)

    def forward(self, noisy: Tensor, noise: Tensor, condition: Tensor) -> Tensor:
        """Mean squared error of the predicted noise."""
        x = self.latents(noisy) + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return F.mse_loss(self.out(self.norm(x)), noise)
