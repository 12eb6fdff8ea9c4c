"""Calls of every kernel, small and checked: what ``make gpu`` looks at first, and what its
sanitizers watch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FIRST", "PROBED", "probe"]

# Rows short and long, aligned and not, registers, clusters and two passes.
PROBED = (8, 64, 100, 128, 1000, 1024, 4096, 4097, 16384, 40000, 131072, 300000)
# With every kind and four dtypes some 450 cases.
FIRST = (
    *(1, 2, 3, 7, 16, 33, 80, 129, 256, 500, 513, 768, 2048),
    *PROBED,
)


@dataclass(frozen=True)
class Kind:
    """Norms of one kind: ours, their definition in plain operations, and their tensors' names."""

    name: str
    ours: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    names: tuple[str, ...]
    wide: bool = False  # two elements into wider rows, the weight fp32 under a half type


def _kinds() -> list[Kind]:
    from fused_rmsnorm import functional as F

    def plain(norm: Callable[..., Tensor], x: Tensor, w: Tensor) -> Tensor:
        return norm(x, w.numel(), w, 1e-6)

    def add(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.add_rms_norm(x, residual, w.numel(), w, 1e-6, bias=b, p=0.3)[0]

    def composed_add(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.composite_rms_norm(x + residual, w.numel(), w, 1e-6, bias=b, p=0.3)

    def per_row(norm: Callable[..., Tensor], x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return norm(x, x.shape[-1], w, 1e-6, bias=b, weight_offset=1.0)

    def pair(
        name: str, call: Callable[..., Tensor], ours: Callable[..., Tensor],
        composed: Callable[..., Tensor], names: tuple[str, ...],
    ) -> Kind:  # fmt: skip
        return Kind(name, functools.partial(call, ours), functools.partial(call, composed), names)

    def gate(name: str, before: bool) -> Kind:
        def call(norm: Callable[..., Tensor], x: Tensor, z: Tensor, w: Tensor) -> Tensor:
            return norm(x, z, w.numel(), w, 1e-6, norm_before_gate=before)

        return pair(name, call, F.rms_norm_gated, F.composite_rms_norm_gated, ("x", "z", "w"))

    return [
        pair("plain", plain, F.rms_norm, F.composite_rms_norm, ("x", "w")),
        Kind("in wider rows", add, composed_add, ("x", "residual", "w", "b"), wide=True),
        pair(
            "under a weight per sample", per_row, F.rms_norm, F.composite_rms_norm,
            ("x", "w per row", "b per row"),
        ),
        gate("before a gate", True),
        gate("after a gate", False),
    ]  # fmt: skip


def probe(device: str, probed: Sequence[int] = PROBED) -> None:
    """Every family and dtype, forward and backward, small batches; raises if a value is wrong.

    The bound is four times the error of the composed definition against fp64, and two ulps, or ten
    of what is summed over rows. On a GPU only the fused kernels and copies run there, so that a
    sanitizer has nothing else to watch.
    """
    random = torch.Generator().manual_seed(0)
    done = 0
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    lengths = [n for n in probed if device == "cuda" or n < 5000]
    for dtype, n, kind in itertools.product(dtypes, lengths, _kinds()):
        if dtype == torch.float64 and "z" in kind.names:
            continue  # no kernel: the definition itself
        shape = (3, n) if n > 20000 else (35, 2, n)
        tensors = {
            "x": _rows(shape, dtype, random, kind.wide),
            "residual": _rows(shape, dtype, random, False),
            "z": _rows(shape, dtype, random, True),
        }
        affine = torch.promote_types(dtype, torch.float32) if kind.wide else dtype
        tensors |= {name: torch.randn(n, generator=random, dtype=affine) for name in ("w", "b")}
        tensors |= {
            f"{name} per row": torch.randn(shape[-2], n, generator=random, dtype=dtype)
            for name in ("w", "b")
        }
        given = [tensors[name] for name in kind.names]
        dy = torch.randn(*shape, generator=random, dtype=dtype)
        _check(kind, given, dy, device)
        done += 1
    print(f"{done} cases right, forward and backward, on {device}")


def _rows(
    shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator, wide: bool
) -> Tensor:
    """Contiguous; or two elements into rows that are wider by five."""
    *leading, n = shape
    made = torch.randn(*leading, n + (5 if wide else 0), generator=random, dtype=dtype)
    return made[..., 2 : 2 + n] if wide else made


def _check(kind: Kind, given: Sequence[Tensor], dy: Tensor, device: str) -> None:
    outcomes = []
    runs: tuple[tuple[Callable[..., Tensor], str, torch.dtype | None], ...] = (
        (kind.definition, "cpu", torch.float64),
        (kind.definition, "cpu", None),
        (kind.ours, device, None),
    )
    for norm, where, dtype in runs:
        leaves = [_moved(t, where, dtype) for t in given]
        y = norm(*leaves)
        grads = torch.autograd.grad(y, leaves, dy.to(where, y.dtype))
        outcomes.append([t.detach().cpu().double() for t in (y, *grads)])
    names = ("y", *(f"gradient of {name}" for name in kind.names))
    for name, want, theirs, got in zip(names, *outcomes, strict=True):
        size = max(float(want.abs().max()), float(dy.abs().max()))  # short rows cancel
        error, bound = ((v - want).abs().max() / size for v in (got, theirs))
        slack = 64 if dy.dtype == torch.float64 else 1  # where the definition errs as much
        ulps = 2 if want.shape == dy.shape else 10
        if not error <= 4 * bound + ulps * slack * torch.finfo(dy.dtype).eps:
            what = f"{name} of {tuple(dy.shape)} {dy.dtype} {kind.name}"
            raise RuntimeError(f"{what}: {error:.2e}, {bound:.2e}")


def _moved(t: Tensor, device: str, dtype: torch.dtype | None) -> Tensor:
    """A leaf of its own with the strides and offset of t."""
    storage = t.as_strided((t.untyped_storage().size() // t.element_size(),), (1,), 0)
    there = storage.detach().to(device, dtype or t.dtype, copy=True)
    return there.as_strided(t.shape, t.stride(), t.storage_offset()).requires_grad_()
