"""Norms as models write them, for the tests of swapping."""

import torch
from torch import nn

N = 8


class PlainNorm(nn.Module):
    """Llama's, and nothing else."""

    def __init__(self, n: int = N, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(n) + 0.5), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = x.float()
        r = torch.rsqrt(torch.mean(a**2, -1, keepdim=True) + self.eps)
        return self.weight * (a * r).to(x.dtype)
