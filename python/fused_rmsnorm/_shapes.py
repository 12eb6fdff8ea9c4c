"""What the functions make of normalized_shape and of group_size: tensors viewed as rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

__all__ = [
    "as_shape",
    "check_tensor",
    "checked_group_size",
    "checked_shape",
    "flat",
    "in_groups",
    "refuse_nested",
    "rows_in_place",
    "rows_of",
]


def flat(t: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
    """Weight or bias with its last ``len(shape)`` dimensions made one."""
    if t is None or len(shape) == 1:
        return t  # the operator checks the sizes
    check_tensor(t, name)
    if tuple(t.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{name} must have shape {list(shape)}, or dimensions before it that broadcast to "
            f"input's, but got {list(t.shape)}"
        )
    return t.flatten(-len(shape))


def check_tensor(t: Tensor, name: str) -> None:
    """Refuses what has no strides or no shape, as the operators do."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(t).__name__}")
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested one: take its values()" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name} must be a strided tensor, but got {kind}")


def rows_of(t: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """``t`` with its last ``len(shape)`` dimensions made one."""
    if len(shape) == 1 and isinstance(t, Tensor) and t.dim() and t.size(-1) == shape[0]:
        return t
    check_tensor(t, name)
    if len(shape) == 0:
        raise RuntimeError("normalized_shape must have at least one dimension, but got []")
    if tuple(t.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{name} must end in normalized_shape {list(shape)}, but has shape {list(t.shape)}"
        )
    return t.flatten(-len(shape))


def rows_in_place(t: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """:func:`rows_of` as a view of ``t``, also of one whose memory cannot be seen (a DTensor)."""
    rows = rows_of(t, shape, name)
    try:
        return t if rows is t else t.view(rows.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name} cannot be viewed as rows of {list(shape)} to be written in place: "
            "make it contiguous"
        ) from None


def as_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if type(normalized_shape) is int:  # no bool
        return (normalized_shape,)
    if isinstance(normalized_shape, (tuple, list)):
        return tuple(normalized_shape)  # whatever it holds is compared with the input's sizes
    if isinstance(normalized_shape, torch.SymInt):
        return (cast(int, normalized_shape),)
    return checked_shape(normalized_shape)


def checked_shape(normalized_shape: Any) -> tuple[int, ...]:
    """One integer or several, also of numpy's types, as a tuple of Python's."""
    several = isinstance(normalized_shape, Iterable) and getattr(normalized_shape, "ndim", 1) != 0
    members = tuple(normalized_shape) if several else (normalized_shape,)
    if not all(isinstance(n, Integral) and not isinstance(n, bool) for n in members):
        raise TypeError(
            f"normalized_shape must be an int or a sequence of ints, but got {normalized_shape!r}"
        )
    return tuple(int(n) for n in members)


def refuse_nested(**tensors: Tensor | None) -> None:
    """Nested tensors take every function named rms_norm for torch's own, with its arguments."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.is_nested:
            check_tensor(t, name)


def checked_group_size(group_size: Any, n: int) -> int:
    """A group size that divides rows of ``n`` elements."""
    if not isinstance(group_size, (Integral, torch.SymInt)) or isinstance(group_size, bool):
        raise TypeError(f"group_size must be None or an int, but got {type(group_size).__name__}")
    size = cast(int, group_size)
    if size < 1 or size >= 1 << 63 or n % size != 0:  # of an empty row there are many divisors
        raise ValueError(
            f"group_size must be a positive number that divides the {n} elements of a row, "
            f"but got {group_size}"
        )
    return int(group_size)


def in_groups(
    t: Tensor | None, shape: tuple[int, ...], group_size: int, name: str
) -> Any:  # Tensor for a Tensor, None for None
    """``t`` with its last ``len(shape)`` dimensions made two: groups, and elements of a group."""
    if t is None:
        return None
    check_tensor(t, name)
    rows = rows_of(t, shape, name)
    n = rows.size(-1)
    return rows.unflatten(-1, (n // checked_group_size(group_size, n), group_size))
