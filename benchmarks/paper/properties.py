"""The paper's Table 1 in numbers, and what few elements in the statistic do to gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import EPS, make_norm

__all__ = ["CHANGES", "INVARIANT", "gradient_norms", "invariance"]

ROWS, INPUTS, OUTPUTS = 64, 256, 512

# What is done to the layer norm(x W^T): x is [rows, inputs], W is [outputs, inputs].
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _scale_one_row(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scaled = w.clone()
    scaled[0] *= 10
    return x, scaled


def _scale_each_case(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x * torch.linspace(1, 10, len(x), device=x.device).unsqueeze(1), w


CHANGES: dict[str, Change] = {
    "W × 10": lambda x, w: (x, w * 10),
    "W + 0.1 (every row by the same vector)": lambda x, w: (x, w + 0.1),
    "one row of W × 10": _scale_one_row,
    "data × 10": lambda x, w: (x * 10, w),
    "data + 1": lambda x, w: (x + 1, w),
    "each case × its own, 1 … 10": _scale_each_case,
    "data × 0.001 (eps no longer small)": lambda x, w: (x * 1e-3, w),
}

# Which of them leave the output as it is, but for eps and rounding, by the paper's Table 1.
_RMS = ("W × 10", "data × 10", "each case × its own, 1 … 10")
INVARIANT: dict[str, tuple[str, ...]] = {
    "none": (),
    "layer_norm": (*_RMS, "W + 0.1 (every row by the same vector)"),
    "rms_norm": _RMS,
    "prms_norm": _RMS,
}


def invariance(device: torch.device, seed: int = 0) -> dict[str, Any]:
    """One entry: change -> norm -> relative change of the output, |y' - y| / |y|."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, INPUTS, generator=random).to(device)
    w = (torch.randn(OUTPUTS, INPUTS, generator=random) / INPUTS**0.5).to(device)
    found: dict[str, dict[str, float]] = {change: {} for change in CHANGES}
    with torch.no_grad():
        for name in INVARIANT:
            norm = make_norm(name)(OUTPUTS).to(device)
            y = norm(F.linear(x, w))
            for change, apply in CHANGES.items():
                other = norm(F.linear(*apply(x, w)))
                found[change][name] = ((other - y).norm() / y.norm()).item()
    return {"rows": ROWS, "inputs": INPUTS, "outputs": OUTPUTS, "eps": EPS, "change": found}


class Deep(nn.Module):
    """relu(norm(W h)), many times; He's initialisation."""

    def __init__(self, n: int, layers: int, k: int) -> None:
        from fused_rmsnorm import RMSNorm

        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(layers):
            linear = nn.Linear(n, n, bias=False)
            nn.init.normal_(linear.weight, std=(2 / n) ** 0.5)
            self.layers.extend([linear, RMSNorm(n, EPS, p=k / n), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def gradient_norms(
    device: torch.device,
    ks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    *,
    n: int = 512,
    layers: int = 12,
    nets: int = 16,
    rows: int = 64,
) -> dict[str, Any]:
    """One entry: k -> quantiles of |dL/dx| at initialisation, over all cases of all networks.

    k of the n elements are in the statistic; k = n is RMSNorm. L is a random linear function of the
    last layer's output. The networks, their data and L are the same for each k.
    """
    found: dict[str, dict[str, float]] = {}
    for k in ks:
        every = []
        for seed in range(nets):
            torch.manual_seed(seed)
            model = Deep(n, layers, k).to(device)
            x, dy = torch.randn(2, rows, n).to(device).unbind(0)
            x.requires_grad_()
            (dx,) = torch.autograd.grad(model(x), x, dy)
            every.append(dx.double().norm(dim=1).cpu())
        norms = torch.cat(every)
        quantiles = torch.quantile(norms, torch.tensor([0.5, 0.99], dtype=torch.float64))
        found[str(k)] = {
            "p50": quantiles[0].item(),
            "p99": quantiles[1].item(),
            "max": norms.max().item(),
        }
    return {"n": n, "layers": layers, "nets": nets, "rows": rows, "eps": EPS, "norms": found}
