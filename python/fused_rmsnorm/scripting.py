"""What torch.jit.script compiles in place of the modules.

TorchScript reads source, and only a small part of Python; the modules' own ``forward`` is written
to be quick in eager mode. torch.jit.script asks a module for a stand-in by
``__prepare_scriptable__`` and, in a model that holds the module, leaves the stand-in there: so it
shares the parameters, is of the module's class as well, prints as it does, and does the same when
Python calls it.
"""

# No `from __future__ import annotations`: TorchScript evaluates a class's annotations, not strings.
from typing import Optional

import torch
from torch import Tensor

from ._ops import ops
from .modules import STAND_INS, AddRMSNorm, PRMSNorm, RMSNorm, RMSNormGated

__all__ = [
    "ScriptableAddRMSNorm",
    "ScriptablePRMSNorm",
    "ScriptableRMSNorm",
    "ScriptableRMSNormGated",
]


def _listed(shape: list[int]) -> list[int]:
    """TorchScript makes a list of the tuple that it is given."""
    return shape


def _rows(
    t: Tensor,
    shape: list[int],
    group_size: Optional[int],  # noqa: UP045
    name: str,
) -> Tensor:
    """As the functions make them: of another shape with as many elements there are rows, too."""
    dims = len(shape)
    if t.dim() < dims or t.shape[t.dim() - dims :] != shape:
        raise RuntimeError(f"{name} must end in normalized_shape {shape}, but has shape {t.shape}")
    rows = t.flatten(-dims)
    return rows if group_size is None else rows.unflatten(-1, [-1, group_size])


class _PrintsAsTheModule(RMSNorm):
    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Scriptable")


class ScriptableRMSNorm(_PrintsAsTheModule):
    weight: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    bias: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    group_size: Optional[int]  # noqa: UP045
    p: Optional[float]  # noqa: UP045
    weight_offset: float

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return super().forward(x)
        weight, bias = self.weight, self.bias
        shape = _listed(self.normalized_shape)  # type: ignore[arg-type]
        group_size = self.group_size
        y = ops.rms_norm(
            _rows(x, shape, group_size, "input"),
            None if weight is None else _rows(weight, shape, group_size, "weight"),
            None if bias is None else _rows(bias, shape, group_size, "bias"),
            self.eps,
            self.p,
            self.weight_offset,
            self.casting_mode,
        )
        return y.view(x.shape)


class ScriptablePRMSNorm(ScriptableRMSNorm, PRMSNorm):
    """Both, in this order: ScriptableRMSNorm's forward, and isinstance of PRMSNorm."""


class ScriptableAddRMSNorm(_PrintsAsTheModule, AddRMSNorm):
    weight: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    bias: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    group_size: Optional[int]  # noqa: UP045
    p: Optional[float]  # noqa: UP045
    weight_offset: float

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not torch.jit.is_scripting():
            return super().forward(input, residual)
        weight, bias = self.weight, self.bias
        shape = _listed(self.normalized_shape)  # type: ignore[arg-type]
        group_size = self.group_size
        y, s = ops.add_rms_norm(
            _rows(input, shape, group_size, "input"),
            _rows(residual, shape, group_size, "residual"),
            None if weight is None else _rows(weight, shape, group_size, "weight"),
            None if bias is None else _rows(bias, shape, group_size, "bias"),
            self.eps,
            self.p,
            self.weight_offset,
            self.casting_mode,
        )
        return y.view(input.shape), s.view(input.shape)


class ScriptableRMSNormGated(_PrintsAsTheModule, RMSNormGated):
    weight: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    bias: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    group_size: Optional[int]  # noqa: UP045
    p: Optional[float]  # noqa: UP045
    weight_offset: float

    def forward(self, input: Tensor, gate: Optional[Tensor] = None) -> Tensor:  # noqa: UP045
        if not torch.jit.is_scripting():
            return super().forward(input, gate)
        weight, bias = self.weight, self.bias
        shape = _listed(self.normalized_shape)  # type: ignore[arg-type]
        group_size = self.group_size
        weight = None if weight is None else _rows(weight, shape, group_size, "weight")
        bias = None if bias is None else _rows(bias, shape, group_size, "bias")
        rows = _rows(input, shape, group_size, "input")
        if gate is None:
            y = ops.rms_norm(
                rows, weight, bias, self.eps, self.p, self.weight_offset, self.casting_mode
            )
        else:
            y = ops.rms_norm_gated(
                rows,
                _rows(gate, shape, group_size, "gate"),
                weight,
                bias,
                self.activation,
                self.norm_before_gate,
                self.eps,
                self.p,
                self.weight_offset,
                self.casting_mode,
            )
        return y.view(input.shape)


STAND_INS.update(
    {
        RMSNorm: ScriptableRMSNorm,
        PRMSNorm: ScriptablePRMSNorm,
        AddRMSNorm: ScriptableAddRMSNorm,
        RMSNormGated: ScriptableRMSNormGated,
    }
)
