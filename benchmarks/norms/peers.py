"""RMSNorm kernels of other projects over the last dimension: the norm as ``f(x, weight)``, and with
the residual add as ``f(x, residual, weight)``, which returns (y, x + residual).

Only what is importable is used; ``absent`` says what is not, and why. Each adapter names what the
peer cannot do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .cases import Kind

__all__ = ["PEERS", "Peer", "absent", "present"]

EPS = 1e-6
Norm = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """``make(module)`` gives the norm; ``handicap`` is what a reader of a ratio must know.

    ``in_place``: the results overwrite the arguments, so each call needs its own.
    """

    module: str
    make: Callable[[Any], Norm]
    backward: bool
    handicap: str
    in_place: bool = False


def _liger(module: Any) -> Norm:
    # offset 0, casting mode "llama", and not in place, which would destroy the gradient it is given
    return lambda x, w: module.LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False)


def _quack(module: Any) -> Norm:
    return lambda x, w: module.rmsnorm(x, w, eps=EPS)


def _flash_attn(module: Any) -> Norm:
    return lambda x, w: module.rms_norm_fn(x, w, None, eps=EPS)


def _flashinfer(module: Any) -> Norm:
    return lambda x, w: module.rmsnorm(x, w, eps=EPS)


def _liger_add(module: Any) -> Norm:
    def norm(x: Tensor, r: Tensor, w: Tensor) -> Any:
        return module.LigerFusedAddRMSNormFunction.apply(x, r, w, EPS, 0.0, "llama", False)

    return norm


def _quack_add(module: Any) -> Norm:
    return lambda x, r, w: module.rmsnorm(x, w, residual=r, eps=EPS, prenorm=True)


def _flash_attn_add(module: Any) -> Norm:
    return lambda x, r, w: module.rms_norm_fn(x, w, None, residual=r, eps=EPS, prenorm=True)


def _flashinfer_add(module: Any) -> Norm:
    def norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        module.fused_add_rmsnorm(x, r, w, eps=EPS)
        return x, r

    return norm


_LIGER, _QUACK = "N at most 65536", "odd N in 16-bit dtypes fails"
_FLASH_ATTN, _FLASHINFER = "rows of 64 KB", "forward only; 16-bit dtypes only"
_TRITON = "flash_attn.ops.triton.layer_norm"
PEERS: dict[Kind, dict[str, Peer]] = {
    "speed": {
        "liger": Peer("liger_kernel.ops.rms_norm", _liger, True, _LIGER),
        "quack": Peer("quack.rmsnorm", _quack, True, _QUACK),
        "flash_attn": Peer(_TRITON, _flash_attn, True, _FLASH_ATTN),
        "flashinfer": Peer("flashinfer.norm", _flashinfer, False, _FLASHINFER),
    },
    "add": {
        "liger": Peer("liger_kernel.ops.fused_add_rms_norm", _liger_add, True, _LIGER),
        "quack": Peer("quack.rmsnorm", _quack_add, True, _QUACK),
        "flash_attn": Peer(_TRITON, _flash_attn_add, True, _FLASH_ATTN),
        "flashinfer": Peer("flashinfer.norm", _flashinfer_add, False, _FLASHINFER, in_place=True),
    },
}


def present(kind: Kind) -> dict[str, tuple[Peer, Norm]]:
    """name -> the peer and its norm, of those that can be imported."""
    found = {}
    for name, peer in PEERS[kind].items():
        try:
            found[name] = (peer, peer.make(importlib.import_module(peer.module)))
        except Exception:
            continue
    return found


def absent() -> dict[str, str]:
    """module -> the error that importing it gives."""
    errors = {}
    for module in {peer.module: None for peers in PEERS.values() for peer in peers.values()}:
        try:
            importlib.import_module(module)
        except Exception as error:
            errors[module] = f"{type(error).__name__}: {error}".splitlines()[0]
    return errors
