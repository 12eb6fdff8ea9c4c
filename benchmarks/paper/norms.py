"""The norm of a model, chosen by name: the one place where the variants differ.

LayerNorm has weight and bias, as torch.nn.LayerNorm; the RMSNorms have a weight only, as the
paper's code and torch.nn.RMSNorm. The biases of the layers around them are the same in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["LABELS", "NORMS", "PARTIAL", "TIMED", "MakeNorm", "make_norm", "normalised"]

EPS = 1e-5  # the same for all


class MakeNorm(Protocol):
    """``norm(n)`` is a module over the last dimension, of n elements."""

    def __call__(self, n: int, affine: bool = True) -> nn.Module: ...


class ComposedLayerNorm(nn.Module):
    """LayerNorm of elementary operations: what the paper's RMSNorm was timed against."""

    def __init__(self, n: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n)) if affine else None
        self.bias = nn.Parameter(torch.zeros(n)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        y = centred * torch.rsqrt(variance + EPS)
        return y if self.weight is None or self.bias is None else y * self.weight + self.bias


def _none(n: int, affine: bool = True) -> nn.Module:
    return nn.Identity()


def _layer_norm(n: int, affine: bool = True) -> nn.Module:
    return nn.LayerNorm(n, EPS, elementwise_affine=affine)


def _torch_rms_norm(n: int, affine: bool = True) -> nn.Module:
    return nn.RMSNorm(n, EPS, elementwise_affine=affine)


def _rms_norm(n: int, affine: bool = True, p: float | None = None) -> nn.Module:
    from fused_rmsnorm import RMSNorm

    return RMSNorm(n, EPS, affine, p=p)


# name in files and options -> fraction p of pRMSNorm
PARTIAL = {
    "prms_norm": 0.0625,
    "prms_norm_12.5": 0.125,
    "prms_norm_25": 0.25,
    "prms_norm_50": 0.5,
}

NORMS: dict[str, Callable[..., nn.Module]] = {
    "none": _none,
    "layer_norm": _layer_norm,
    "layer_norm_composed": ComposedLayerNorm,
    "rms_norm": _rms_norm,
    "torch_rms_norm": _torch_rms_norm,
    **{name: functools.partial(_rms_norm, p=p) for name, p in PARTIAL.items()},
}

LABELS = {
    "none": "no norm",
    "layer_norm": "LayerNorm",
    "layer_norm_composed": "LayerNorm as the paper had it",
    "rms_norm": "RMSNorm (ours)",
    "torch_rms_norm": "torch.nn.RMSNorm",
    **{name: f"pRMSNorm {100 * p:g} % (ours)" for name, p in PARTIAL.items()},
}

# What the table of times compares.
TIMED = ("none", "layer_norm", "layer_norm_composed", "rms_norm", "prms_norm", "torch_rms_norm")


def make_norm(name: str) -> MakeNorm:
    """The factory that a model takes.

    Raises:
        ValueError: no such norm.
    """
    if name not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, but got {name!r}")
    return NORMS[name]


def normalised(norm: MakeNorm, n: int, layer: nn.Module) -> nn.Module:
    """``layer`` and then its norm over n features."""
    return nn.Sequential(layer, norm(n))
