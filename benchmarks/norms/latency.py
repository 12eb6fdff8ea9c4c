"""Host latency: the smallest calls, where what is paid per call decides.

An RNN makes thousands of them a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..harness.timing import Contender, measure, threads
from .speed import EPS, P, norms

__all__ = ["time_latency"]

N = 128


def _call(norm: Callable[[Tensor], Tensor], mode: str, dy: Tensor) -> Callable[[Tensor], object]:
    if mode == "forward+backward":
        return lambda x: norm(x).backward(dy)
    return norm


def time_latency(seconds: float) -> dict[str, dict[str, Any]]:
    """Host time of the smallest calls, 1 x 128 fp32 on one CPU thread: functions and modules.

    key -> entry, with a Timing per contender.
    """
    import fused_rmsnorm as ours

    x, dy = torch.randn(1, N, requires_grad=True), torch.randn(1, N)
    w, b = torch.ones(N, requires_grad=True), torch.zeros(N, requires_grad=True)
    calls: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        "function": {
            name: lambda x, norm=norm: norm(x, w, b)  # type: ignore[misc]
            for name, norm in norms(N, False).items()
        },
        "module": {
            "rms_norm": ours.RMSNorm(N, EPS),
            "prms_norm": ours.PRMSNorm(N, P, EPS),
            "torch_layer_norm": nn.LayerNorm(N, EPS),
            "torch_rms_norm": nn.RMSNorm(N, EPS),
        },
    }
    entries: dict[str, dict[str, Any]] = {}
    with threads(1):
        for kind, found in calls.items():
            for mode in ("no grad", "recording grad", "forward+backward"):
                contenders = [Contender(k, _call(f, mode, dy), [x]) for k, f in found.items()]
                with torch.set_grad_enabled(mode != "no grad"):
                    times = measure(contenders, seconds=seconds)
                entries[f"latency/{kind}/{mode}"] = {"kind": kind, "mode": mode, "times": times}
    return entries
