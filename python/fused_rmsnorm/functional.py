"""RMSNorm and pRMSNorm as functions.

With ``x`` a row of N numbers, ``w`` the weight and ``b`` the bias::

    r = 1 / sqrt(mean(x[j]**2 for j < k) + eps)      k = N; with p the smallest k with k / N >= p
    y = x * r * (weight_offset + w) + b

RMSNorm is Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, equation 4;
``p`` is its section 4, pRMSNorm. Statistics and every intermediate are fp32 (fp64 for fp64 input),
rounded once at the end. ``casting_mode="llama"`` instead rounds ``x * r`` to ``x``'s dtype before
the weight is multiplied, as the Llama family of transformers does; the result then has the
promoted dtype when the weight is wider.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _eager
from ._ops import ops

__all__ = [
    "CastingMode",
    "add_rms_norm",
    "add_rms_norm_",
    "composite_rms_norm",
    "rms_norm",
]

CastingMode = Literal["torch", "llama"]

# What traces Python sees these; eager mode takes the same operators through _eager, which spares
# a third of the time of a small call and names the argument in every error.
_rms_norm = ops.rms_norm.default
_rms_norm_composite = ops.rms_norm_composite.default
_add_rms_norm = ops.add_rms_norm.default
_add_rms_norm_ = ops.add_rms_norm_.default

_is_compiling = torch.compiler.is_compiling


def _flat(t: Tensor | None, shape: tuple[int, ...], name: str) -> Tensor | None:
    """Weight or bias as a vector, from ``normalized_shape``."""
    if t is None or len(shape) == 1:
        return t  # the operator checks the length
    _check_tensor(t, name)
    if tuple(t.shape) != shape:
        raise RuntimeError(f"{name} must have shape {list(shape)}, but got {list(t.shape)}")
    return t.reshape(-1)


def _check_tensor(t: Tensor, name: str) -> None:
    """Refuses what has no strides or no shape, as the operators do."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a Tensor, but got {type(t).__name__}")
    if t.is_nested or t.layout is not torch.strided:
        kind = "a nested one: take its values()" if t.is_nested else f"layout {t.layout}"
        raise TypeError(f"{name} must be a strided tensor, but got {kind}")


def _rows(t: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """``t`` with its last ``len(shape)`` dimensions made one."""
    if len(shape) == 1 and isinstance(t, Tensor) and t.dim() and t.size(-1) == shape[0]:
        return t
    _check_tensor(t, name)
    if len(shape) == 0:
        raise RuntimeError("normalized_shape must have at least one dimension, but got []")
    if tuple(t.shape[-len(shape) :]) != shape:
        raise RuntimeError(
            f"{name} must end in normalized_shape {list(shape)}, but has shape {list(t.shape)}"
        )
    return t.flatten(-len(shape))


def _rows_in_place(t: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """:func:`_rows` as a view of ``t``, also of one whose memory cannot be seen (a DTensor)."""
    rows = _rows(t, shape, name)
    try:
        return t if rows is t else t.view(rows.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{name} cannot be viewed as rows of {list(shape)} to be written in place: "
            "make it contiguous"
        ) from None


def _as_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, int):
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


def _refuse_nested(**tensors: Tensor | None) -> None:
    """Nested tensors take every function named rms_norm for torch's own, with its arguments."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.is_nested:
            _check_tensor(t, name)


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: CastingMode = "torch",
) -> Tensor:
    """RMSNorm, or pRMSNorm with ``p``, over the last dimensions. A superset of F.rms_norm.

    Args:
        input: float16, bfloat16, float32, float64, complex64 or complex128, shape
            ``[*, *normalized_shape]``, any strides; neither sparse nor nested.
        normalized_shape: the last dimensions of ``input``, normalised together: an integer, also
            of numpy's types, or a sequence of them.
        weight: shape ``normalized_shape``, any of float16, bfloat16, float32 and float64 (fp32 with
            bf16 input is fused, too); complex if ``input`` is.
        eps: added to the mean square, inside the root. None: the epsilon of the arithmetic type,
            fp32 for the half types, as torch.nn.RMSNorm. Any number: rows whose mean square is
            below ``-eps`` become NaN.
        bias: shape ``normalized_shape``.
        p: fraction in (0, 1] of the leading elements that the mean square is taken over: k is the
            smallest integer with ``k / N >= p`` in fp64. So p = 0.07 of 100 reads 7, and
            ``p=k / N`` reads k.
        weight_offset: 1.0 for the Gemma family, whose weight starts at 0. Needs a weight. Like
            ``eps`` and ``p`` a number: bool is refused, a 0-dim tensor taken if it does not
            require grad.
        casting_mode: ``"torch"`` or ``"llama"``, see above.

    Returns:
        Shape and dtype of ``input`` (in llama mode with a wider weight: the promoted dtype),
        contiguous.

    Raises:
        ValueError: ``p``, ``weight_offset`` or ``casting_mode`` outside what is accepted, or a
            ``weight_offset`` without a weight.
        RuntimeError: shapes or devices do not match.
        TypeError: a dtype, a layout or the type of an argument is not accepted.
    """
    if has_torch_function_variadic(input, weight, bias):
        _refuse_nested(input=input, weight=weight, bias=bias)
        return handle_torch_function(
            rms_norm,
            (input, weight, bias),
            input,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = _as_shape(normalized_shape)
    rows = _rows(input, shape, "input")
    op = _rms_norm if _is_compiling() else _eager.rms_norm
    y = op(
        rows,
        _flat(weight, shape, "weight"),
        _flat(bias, shape, "bias"),
        eps,
        p,
        weight_offset,
        casting_mode,
    )
    return y if rows is input else y.view(input.shape)


def composite_rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: CastingMode = "torch",
) -> Tensor:
    """The definition of :func:`rms_norm`, same arguments, made of plain torch operations.

    Slower in eager mode, and right in every mode and on every device; under torch.compile Inductor
    can fuse it with what stands around it (``RMSNorm(..., compile_mode="fuse")``).
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            composite_rms_norm,
            (input, weight, bias),
            input,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = _as_shape(normalized_shape)
    rows = _rows(input, shape, "input")
    op = _rms_norm_composite if _is_compiling() else _eager.composite_rms_norm
    y = op(
        rows,
        _flat(weight, shape, "weight"),
        _flat(bias, shape, "bias"),
        eps,
        p,
        weight_offset,
        casting_mode,
    )
    return y if rows is input else y.view(input.shape)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: CastingMode = "torch",
) -> tuple[Tensor, Tensor]:
    """``s = input + residual; return rms_norm(s), s`` in one pass: the pre-norm residual add.

    The sum is rounded to the input's dtype before it is normalised, so the result is the one of
    the two separate steps.

    Args:
        residual: shape, dtype and device of ``input``.
        Others: see :func:`rms_norm`.

    Returns:
        ``(y, s)``, both new and contiguous.
    """
    if has_torch_function_variadic(input, residual, weight, bias):
        return handle_torch_function(
            add_rms_norm,
            (input, residual, weight, bias),
            input,
            residual,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = _as_shape(normalized_shape)
    rows = _rows(input, shape, "input")
    op = _add_rms_norm if _is_compiling() else _eager.add_rms_norm
    y, s = op(
        rows,
        _rows(residual, shape, "residual"),
        _flat(weight, shape, "weight"),
        _flat(bias, shape, "bias"),
        eps,
        p,
        weight_offset,
        casting_mode,
    )
    return (y, s) if rows is input else (y.view(input.shape), s.view(input.shape))


def add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: CastingMode = "torch",
) -> tuple[Tensor, Tensor]:
    """:func:`add_rms_norm` in place: ``y`` is written into ``input`` and the sum into ``residual``.

    For inference: it has no derivative and raises RuntimeError where one would be recorded, and
    where input, residual, weight or bias share memory, rows that overlap included.

    Returns:
        ``(input, residual)``.
    """
    if has_torch_function_variadic(input, residual, weight, bias):
        return handle_torch_function(
            add_rms_norm_,
            (input, residual, weight, bias),
            input,
            residual,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = _as_shape(normalized_shape)
    rows = _rows_in_place(input, shape, "input")
    residual_rows = _rows_in_place(residual, shape, "residual")
    op = _add_rms_norm_ if _is_compiling() else _eager.add_rms_norm_
    op(
        rows,
        residual_rows,
        _flat(weight, shape, "weight"),
        _flat(bias, shape, "bias"),
        eps,
        p,
        weight_offset,
        casting_mode,
    )
    return input, residual
