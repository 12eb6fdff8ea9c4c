"""RMSNorm kernels of other projects, as ``f(x, weight)`` over the last dimension.

Only what is importable is used; ``absent`` says what is not, and why. Each adapter names what the
peer cannot do, which the tables repeat.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["PEERS", "Peer", "absent", "present"]

EPS = 1e-6
Norm = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """``make(module)`` gives the norm; ``handicap`` is what a reader of a ratio must know."""

    module: str
    make: Callable[[Any], Norm]
    backward: bool
    handicap: str


def _liger(module: Any) -> Norm:
    # offset 0, casting mode "llama", and not in place, which would destroy the gradient it is given
    return lambda x, w: module.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def _quack(module: Any) -> Norm:
    return lambda x, w: module.rmsnorm(x, w, eps=EPS)


def _flash_attn(module: Any) -> Norm:
    return lambda x, w: module.rms_norm_fn(x, w, None, eps=EPS)


def _flashinfer(module: Any) -> Norm:
    return lambda x, w: module.rmsnorm(x, w, eps=EPS)


PEERS = {
    "liger": Peer("liger_kernel.ops.rms_norm", _liger, True, "N at most 65536"),
    "quack": Peer("quack.rmsnorm", _quack, True, "odd N in 16-bit dtypes fails"),
    "flash_attn": Peer("flash_attn.ops.triton.layer_norm", _flash_attn, True, "rows of 64 KB"),
    "flashinfer": Peer("flashinfer.norm", _flashinfer, False, "forward only; 16-bit dtypes only"),
}


def present() -> dict[str, tuple[Peer, Norm]]:
    """name -> the peer and its norm, of those that can be imported."""
    found = {}
    for name, peer in PEERS.items():
        try:
            found[name] = (peer, peer.make(importlib.import_module(peer.module)))
        except Exception:
            continue
    return found


def absent() -> dict[str, str]:
    """name -> the error that importing it gives."""
    errors = {}
    for name, peer in PEERS.items():
        try:
            importlib.import_module(peer.module)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return errors
