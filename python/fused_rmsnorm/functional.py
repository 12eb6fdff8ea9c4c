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

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _eager
from ._numbers import traced_numbers
from ._ops import ops
from ._shapes import as_shape, flat, in_groups, refuse_nested, rows_in_place, rows_of

__all__ = [
    "Activation",
    "CastingMode",
    "add_rms_norm",
    "add_rms_norm_",
    "composite_rms_norm",
    "composite_rms_norm_gated",
    "rms_norm",
    "rms_norm_gated",
]

CastingMode = Literal["torch", "llama"]
Activation = Literal["silu", "sigmoid"]

# What traces Python sees these; eager mode takes the same operators through _eager, which spares
# a third of the time of a small call and names the argument in every error.
_rms_norm = ops.rms_norm.default
_rms_norm_composite = ops.rms_norm_composite.default
_rms_norm_gated = ops.rms_norm_gated.default
_rms_norm_gated_composite = ops.rms_norm_gated_composite.default
_add_rms_norm = ops.add_rms_norm.default
_add_rms_norm_ = ops.add_rms_norm_.default

_is_compiling = torch.compiler.is_compiling


def rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    group_size: int | None = None,
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
        weight: shape ``normalized_shape``, or with dimensions before it that broadcast to
            ``input``'s: (heads, D) for a norm per head, (batch, 1, D) for modulation. Any of
            float16, bfloat16, float32 and float64 (fp32 with bf16 input is fused, too); complex if
            ``input`` is.
        eps: added to the mean square, inside the root. None: the epsilon of the arithmetic type,
            fp32 for the half types, as torch.nn.RMSNorm. Any number: rows whose mean square is
            below ``-eps`` become NaN.
        bias: as ``weight``, of which it may differ in shape and dtype.
        group_size: each row of ``normalized_shape`` is cut into groups of so many elements, each
            normalised by itself (Mamba 2, Zamba 2, Nemotron-H). The weight keeps its shape.
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
        ValueError: ``p``, ``group_size``, ``weight_offset`` or ``casting_mode`` outside what is
            accepted, or a ``weight_offset`` without a weight.
        RuntimeError: shapes or devices do not match.
        TypeError: a dtype, a layout or the type of an argument is not accepted.
    """
    if has_torch_function_variadic(input, weight, bias):
        refuse_nested(input=input, weight=weight, bias=bias)
        return handle_torch_function(
            rms_norm,
            (input, weight, bias),
            input,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = as_shape(normalized_shape)
    if group_size is None:
        rows = rows_of(input, shape, "input")
        w = flat(weight, shape, "weight")
        b = flat(bias, shape, "bias")
    else:
        rows = in_groups(input, shape, group_size, "input")
        w = in_groups(weight, shape, group_size, "weight")
        b = in_groups(bias, shape, group_size, "bias")
    op = _eager.rms_norm
    if _is_compiling():
        op = _rms_norm
        eps, p, weight_offset = traced_numbers(eps, p, weight_offset)
    y = op(rows, w, b, eps, p, weight_offset, casting_mode)
    return y if rows is input else y.reshape(input.shape)


def composite_rms_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    group_size: int | None = None,
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
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = as_shape(normalized_shape)
    if group_size is None:
        rows = rows_of(input, shape, "input")
        w = flat(weight, shape, "weight")
        b = flat(bias, shape, "bias")
    else:
        rows = in_groups(input, shape, group_size, "input")
        w = in_groups(weight, shape, group_size, "weight")
        b = in_groups(bias, shape, group_size, "bias")
    op = _eager.composite_rms_norm
    if _is_compiling():
        op = _rms_norm_composite
        eps, p, weight_offset = traced_numbers(eps, p, weight_offset)
    y = op(rows, w, b, eps, p, weight_offset, casting_mode)
    return y if rows is input else y.reshape(input.shape)


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    group_size: int | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: CastingMode = "torch",
) -> tuple[Tensor, Tensor]:
    """``s = input + residual; return rms_norm(s), s`` in one pass: the pre-norm residual add.

    The sum has the residual's dtype and is rounded to it before it is normalised, so the result is
    the one of the two separate steps. With a residual stream in fp32 under bf16 or fp16 branches
    nothing is rounded to the half type but ``y``.

    Args:
        residual: shape and device of ``input``; its dtype or a wider one.
        Others: see :func:`rms_norm`.

    Returns:
        ``(y, s)``, both new and contiguous; ``y`` in the dtype that ``rms_norm(input)`` has, ``s``
        in the residual's.
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
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = as_shape(normalized_shape)
    if group_size is None:
        rows = rows_of(input, shape, "input")
        residual_rows = rows_of(residual, shape, "residual")
        w = flat(weight, shape, "weight")
        b = flat(bias, shape, "bias")
    else:
        rows = in_groups(input, shape, group_size, "input")
        residual_rows = in_groups(residual, shape, group_size, "residual")
        w = in_groups(weight, shape, group_size, "weight")
        b = in_groups(bias, shape, group_size, "bias")
    op = _eager.add_rms_norm
    if _is_compiling():
        op = _add_rms_norm
        eps, p, weight_offset = traced_numbers(eps, p, weight_offset)
    y, s = op(rows, residual_rows, w, b, eps, p, weight_offset, casting_mode)
    return (y, s) if rows is input else (y.reshape(input.shape), s.reshape(input.shape))


def add_rms_norm_(
    input: Tensor,
    residual: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    group_size: int | None = None,
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
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = as_shape(normalized_shape)
    rows = rows_in_place(input, shape, "input")
    residual_rows = rows_in_place(residual, shape, "residual")
    if group_size is None:
        w = flat(weight, shape, "weight")
        b = flat(bias, shape, "bias")
    else:
        row = (rows.size(-1),)
        rows = in_groups(rows, row, group_size, "input")
        residual_rows = in_groups(residual_rows, row, group_size, "residual")
        w = in_groups(weight, shape, group_size, "weight")
        b = in_groups(bias, shape, group_size, "bias")
    op = _eager.add_rms_norm_
    if _is_compiling():
        op = _add_rms_norm_
        eps, p, weight_offset = traced_numbers(eps, p, weight_offset)
    op(rows, residual_rows, w, b, eps, p, weight_offset, casting_mode)
    return input, residual


def rms_norm_gated(
    input: Tensor,
    gate: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: CastingMode = "torch",
) -> Tensor:
    """``rms_norm(input) * act(gate)``, or ``rms_norm(input * act(gate))``, in one pass.

    As in mamba_ssm and flash-linear-attention. The gate and the product are in the arithmetic type.
    With ``casting_mode="llama"`` the norm is rounded as :func:`rms_norm` rounds it before a gate
    multiplies it; of ``input * act(gate)`` nothing is rounded before the norm. These are the
    roundings of transformers: Mamba 2, Zamba 2, Bamba, GraniteMoeHybrid and Nemotron-H are
    ``"llama"`` with the gate first, Qwen3-Next is ``"llama"`` with the norm first, FalconH1 is
    ``"torch"``.

    Args:
        input: float16, bfloat16, float32 or float64, shape ``[*, *normalized_shape]``.
        gate: shape of ``input``; any of these dtypes.
        activation: ``"silu"``, z sigmoid(z), or ``"sigmoid"``.
        norm_before_gate: whether the norm comes first, and with it weight and bias.
        Others: see :func:`rms_norm`.

    Returns:
        Shape and dtype of ``input``, contiguous. In llama mode with a wider weight and the gate
        first: the promoted dtype.
    """
    if has_torch_function_variadic(input, gate, weight, bias):
        refuse_nested(input=input, gate=gate, weight=weight, bias=bias)
        return handle_torch_function(
            rms_norm_gated,
            (input, gate, weight, bias),
            input,
            gate,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            activation=activation,
            norm_before_gate=norm_before_gate,
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = as_shape(normalized_shape)
    op = _eager.rms_norm_gated
    if _is_compiling():
        op = _rms_norm_gated
        eps, p, weight_offset = traced_numbers(eps, p, weight_offset)
    if group_size is None:
        args = (
            rows_of(input, shape, "input"),
            rows_of(gate, shape, "gate"),
            flat(weight, shape, "weight"),
            flat(bias, shape, "bias"),
        )
    else:
        args = (
            in_groups(input, shape, group_size, "input"),
            in_groups(gate, shape, group_size, "gate"),
            in_groups(weight, shape, group_size, "weight"),
            in_groups(bias, shape, group_size, "bias"),
        )
    y = op(*args, activation, norm_before_gate, eps, p, weight_offset, casting_mode)
    return y if args[0] is input else y.reshape(input.shape)


def composite_rms_norm_gated(
    input: Tensor,
    gate: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    bias: Tensor | None = None,
    activation: Activation = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    p: float | None = None,
    weight_offset: float = 0.0,
    casting_mode: CastingMode = "torch",
) -> Tensor:
    """The definition of :func:`rms_norm_gated`, made of plain torch operations."""
    if has_torch_function_variadic(input, gate, weight, bias):
        refuse_nested(input=input, gate=gate, weight=weight, bias=bias)
        return handle_torch_function(
            composite_rms_norm_gated,
            (input, gate, weight, bias),
            input,
            gate,
            normalized_shape,
            weight,
            eps,
            bias=bias,
            activation=activation,
            norm_before_gate=norm_before_gate,
            group_size=group_size,
            p=p,
            weight_offset=weight_offset,
            casting_mode=casting_mode,
        )
    shape = as_shape(normalized_shape)
    op = _eager.composite_rms_norm_gated
    if _is_compiling():
        op = _rms_norm_gated_composite
        eps, p, weight_offset = traced_numbers(eps, p, weight_offset)
    if group_size is None:
        args = (
            rows_of(input, shape, "input"),
            rows_of(gate, shape, "gate"),
            flat(weight, shape, "weight"),
            flat(bias, shape, "bias"),
        )
    else:
        args = (
            in_groups(input, shape, group_size, "input"),
            in_groups(gate, shape, group_size, "gate"),
            in_groups(weight, shape, group_size, "weight"),
            in_groups(bias, shape, group_size, "bias"),
        )
    y = op(*args, activation, norm_before_gate, eps, p, weight_offset, casting_mode)
    return y if args[0] is input else y.reshape(input.shape)
