"""What torch.onnx.export has to know of the operators. Needs onnxscript, as the exporter does::

    import fused_rmsnorm.onnx

    torch.onnx.export(
        model, args, dynamo=True, opset_version=23,
        custom_translation_table=fused_rmsnorm.onnx.translation_table(23),
    )

From opset 23 on a norm becomes the standard operator RMSNormalization, in fp32: the standard rounds
to the input's type before the weight is multiplied, so half types are widened around it. Before
opset 23, for fp64 and for pRMSNorm the arithmetic is written out. Roundings are those of
``casting_mode`` in every case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from ._columns import stat_columns
from ._ops import ops

try:
    from onnxscript import ir, opset23
    from onnxscript import opset18 as op
except ImportError as error:
    raise ImportError(
        "fused_rmsnorm.onnx needs onnxscript, as torch.onnx.export does: pip install onnxscript"
    ) from error

__all__ = ["translation_table"]

Value = Any  # a symbolic tensor: onnxscript's type for it is private
_TORCH = {
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
}
_ONNX = {torch_type: onnx_type for onnx_type, torch_type in _TORCH.items()}


def translation_table(opset_version: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``custom_translation_table`` of torch.onnx.export: the forward operators.

    Args:
        opset_version: the one that is passed to torch.onnx.export.
    """
    standard = opset_version >= 23

    def rms_norm_fwd(
        input: Value,
        weight: Value = None,
        bias: Value = None,
        eps: float | None = None,
        p: float | None = None,
        weight_offset: float = 0.0,
        casting_mode: str = "torch",
    ) -> Value:
        norm = _Norm(input, eps, p, casting_mode == "llama", standard)
        return norm.scaled(weight, bias, weight_offset), norm.rstd

    def add_rms_norm_fwd(
        input: Value,
        residual: Value,
        weight: Value = None,
        bias: Value = None,
        eps: float | None = None,
        p: float | None = None,
        weight_offset: float = 0.0,
        casting_mode: str = "torch",
    ) -> Value:
        norm = _Norm(input, eps, p, casting_mode == "llama", standard, residual)
        return norm.scaled(weight, bias, weight_offset), norm.sum, norm.rstd

    def rms_norm_gated_fwd(
        input: Value,
        gate: Value,
        weight: Value = None,
        bias: Value = None,
        activation: str = "silu",
        norm_before_gate: bool = True,
        eps: float | None = None,
        p: float | None = None,
        weight_offset: float = 0.0,
        casting_mode: str = "torch",
    ) -> Value:
        llama, dtype = casting_mode == "llama", _TORCH[input.dtype]
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        z = _cast(gate, acc)
        act = op.Sigmoid(z)
        if activation == "silu":
            act = op.Mul(z, act)
        if norm_before_gate:
            norm = _Norm(input, eps, p, llama, standard)
            y = norm.unrounded(weight, bias, weight_offset)
            if llama:
                y = _cast(y, norm.output_type(weight))
                y = _cast(y, norm.wide(weight))
            return _cast(op.Mul(y, _cast(act, norm.wide(weight))), dtype), norm.rstd
        norm = _Norm(input, eps, p, llama, standard, gate=act)
        return norm.scaled(weight, bias, weight_offset), norm.rstd

    return {
        ops.rms_norm_fwd.default: rms_norm_fwd,
        ops.rms_norm_gated_fwd.default: rms_norm_gated_fwd,
        ops.add_rms_norm_fwd.default: add_rms_norm_fwd,
    }


def _constant(value: float | int, dtype: ir.DataType) -> Value:
    return op.Constant(value=cast(Any, ir.tensor([value], dtype=dtype)))


def _cast(value: Value, dtype: torch.dtype) -> Value:
    return value if value.dtype == _ONNX[dtype] else op.Cast(value, to=_ONNX[dtype])


class _Norm:
    """Rows in the arithmetic type, their statistic, and what the weight is multiplied with."""

    def __init__(
        self,
        input: Value,
        eps: float | None,
        p: float | None,
        llama: bool,
        standard: bool,
        residual: Value = None,
        gate: Value = None,
    ) -> None:
        self.llama = self.promotes = llama
        self.dtype = _TORCH[input.dtype]
        self.acc = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.rows, self.sum = _cast(input, self.acc), input
        if residual is not None:  # in the residual's dtype, and rounded to it before the norm
            sum_type = _TORCH[residual.dtype]
            self.acc = torch.promote_types(self.acc, sum_type)
            self.sum = _cast(op.Add(_cast(input, self.acc), _cast(residual, self.acc)), sum_type)
            self.rows = _cast(self.sum, self.acc)
            self.llama &= sum_type == self.dtype  # else nothing is rounded before the weight
        if gate is not None:  # in the arithmetic type, as the product is
            self.rows = op.Mul(self.rows, gate)
        self.eps = torch.finfo(self.acc).eps if eps is None else eps
        self.standard = standard and p is None and self.acc == torch.float32
        head = self.rows
        if p is not None:
            n = input.shape[-1]
            if not isinstance(n, int):
                raise ValueError(f"with p the last dimension has to be static, but it is {n}")
            ends = (0, stat_columns(p, n), -1)
            zero, end, last = (_constant(i, ir.DataType.INT64) for i in ends)
            head = op.Slice(head, zero, end, last)
        mean = op.ReduceMean(op.Mul(head, head), _constant(-1, ir.DataType.INT64), keepdims=1)
        self.rstd = op.Reciprocal(op.Sqrt(op.Add(mean, _constant(self.eps, _ONNX[self.acc]))))

    def scaled(self, weight: Value | None, bias: Value | None, offset: float) -> Value:
        """y, in the dtype that the operator gives it."""
        return _cast(self.unrounded(weight, bias, offset), self.output_type(weight))

    def output_type(self, weight: Value | None) -> torch.dtype:
        if self.promotes and weight is not None:
            return torch.promote_types(self.dtype, _TORCH[weight.dtype])
        return self.dtype

    def wide(self, weight: Value | None) -> torch.dtype:
        return torch.promote_types(self.acc, self.output_type(weight))

    def unrounded(self, weight: Value | None, bias: Value | None, offset: float) -> Value:
        wide = self.wide(weight)
        scale = None
        if weight is not None:
            scale = _cast(weight, wide)
            if offset:
                scale = op.Add(scale, _constant(offset, _ONNX[wide]))
        has_rows = weight is not None and len(weight.shape) > 1  # which the standard scale has not
        if self.llama or wide != self.acc or has_rows:
            y = self.normalised(None)
            y = _cast(_cast(y, self.dtype) if self.llama else y, wide)
            y = y if scale is None else op.Mul(y, scale)
        else:
            y = self.normalised(scale)
        if bias is not None:
            y = op.Add(y, _cast(bias, wide))
        return y

    def normalised(self, scale: Value | None) -> Value:
        if self.standard:
            scale = _constant(1.0, _ONNX[self.acc]) if scale is None else scale
            return opset23.RMSNormalization(self.rows, scale, axis=-1, epsilon=self.eps)
        y = op.Mul(self.rows, self.rstd)
        return y if scale is None else op.Mul(y, scale)
