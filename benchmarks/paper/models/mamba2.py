"""Mamba-2 blocks (Dao and Gu 2024), sizes of the 130M model: width 768, inner 1536, state 128.

A norm before the block and one of the gated output inside it; two blocks. The state-space layer is
computed in its quadratic form, y = (L * (C B^T)) (dt x), which is exact and suits sequences of one
chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm

__all__ = ["Mamba2", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    width: int = 768
    inner: int = 1536
    state: int = 128
    head: int = 64
    layers: int = 2
    batch: int = 8
    length: int = 256


def scaled(scale: float) -> Sizes:
    """Fewer and shorter sequences."""
    return Sizes(batch=max(1, int(8 * scale)), length=max(16, int(256 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hidden states and what they should become."""
    shape = (sizes.batch, sizes.length, sizes.width)
    states, target = (torch.randn(shape, generator=random) for _ in range(2))
    return states, target


def state_space(x: Tensor, dt: Tensor, rate: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """x [batch, time, heads, head], dt [batch, time, heads], rate [heads], b, c [batch, time, n].

    h_t = exp(rate dt_t) h_{t-1} + dt_t b_t x_t,  y_t = c_t h_t.
    """
    decay = (rate * dt).cumsum(1).transpose(1, 2)  # [batch, heads, time]
    span = decay.unsqueeze(-1) - decay.unsqueeze(-2)
    past = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
    weights = torch.exp(span.masked_fill(~past, -torch.inf)) * (c @ b.transpose(1, 2)).unsqueeze(1)
    return (weights @ (x * dt.unsqueeze(-1)).transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, norm: MakeNorm, s: Sizes) -> None:
        super().__init__()
        self.sizes, heads = s, s.inner // s.head
        self.norm, self.gated_norm = norm(s.width), norm(s.inner)
        self.mixed = s.inner + 2 * s.state
        self.project = nn.Linear(s.width, s.inner + self.mixed + heads, bias=False)
        self.convolution = nn.Conv1d(self.mixed, self.mixed, 4, groups=self.mixed, padding=3)
        self.log_rate = nn.Parameter(torch.linspace(0, 2.7, heads))
        self.dt_bias = nn.Parameter(torch.full((heads,), -4.0))
        self.skip = nn.Parameter(torch.ones(heads))
        self.out = nn.Linear(s.inner, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = self.sizes
        z, mixed, dt = self.project(self.norm(x)).split(
            [s.inner, self.mixed, s.inner // s.head], -1
        )
        mixed = self.convolution(mixed.transpose(1, 2))[..., : x.size(1)].transpose(1, 2)
        v, b, c = F.silu(mixed).split([s.inner, s.state, s.state], -1)
        v = v.unflatten(-1, (-1, s.head))
        y = state_space(v, F.softplus(dt + self.dt_bias), -self.log_rate.exp(), b, c)
        y = (y + self.skip.unsqueeze(-1) * v).flatten(2)
        return x + self.out(self.gated_norm(y * F.silu(z)))


class Mamba2(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(norm, sizes) for _ in range(sizes.layers)))
        self.norm = norm(sizes.width)

    def forward(self, states: Tensor, target: Tensor) -> Tensor:
        """Mean squared distance. The states get a gradient, as from the layers below in a stack."""
        states = states.detach().requires_grad_()
        return F.mse_loss(self.norm(self.blocks(states)), target)
