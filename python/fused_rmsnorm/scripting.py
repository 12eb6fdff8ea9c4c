"""What torch.jit.script compiles in place of the modules.

TorchScript reads source, and a small part of Python only; the modules' own ``forward`` is written
to be quick in eager mode instead. torch.jit.script asks a module for a stand-in by
``__prepare_scriptable__`` and, in a model that holds the module, leaves the stand-in there: so it
shares the parameters, is an RMSNorm as well, and does the same when Python calls it.
"""

# No `from __future__ import annotations`: TorchScript evaluates those of a class, not strings.
import copy
from typing import Optional

import torch
from torch import Tensor, nn

from ._ops import ops
from .modules import AddRMSNorm, PRMSNorm, RMSNorm

__all__ = ["ScriptableAddRMSNorm", "ScriptableRMSNorm", "scriptable"]


class ScriptableRMSNorm(RMSNorm):
    weight: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    bias: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    p: Optional[float]  # noqa: UP045
    weight_offset: float

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return super().forward(input)
        weight, bias = self.weight, self.bias
        y = ops.rms_norm(
            input.flatten(-len(self.normalized_shape)),
            None if weight is None else weight.flatten(),
            None if bias is None else bias.flatten(),
            self.eps,
            self.p,
            self.weight_offset,
            self.casting_mode,
        )
        return y.view(input.shape)


class ScriptableAddRMSNorm(AddRMSNorm):
    weight: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    bias: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    p: Optional[float]  # noqa: UP045
    weight_offset: float

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if not torch.jit.is_scripting():
            return super().forward(input, residual)
        weight, bias = self.weight, self.bias
        y, s = ops.add_rms_norm(
            input.flatten(-len(self.normalized_shape)),
            residual.flatten(-len(self.normalized_shape)),
            None if weight is None else weight.flatten(),
            None if bias is None else bias.flatten(),
            self.eps,
            self.p,
            self.weight_offset,
            self.casting_mode,
        )
        return y.view(input.shape), s.view(input.shape)


_STAND_INS: dict[type, type[RMSNorm]] = {
    RMSNorm: ScriptableRMSNorm,
    PRMSNorm: ScriptableRMSNorm,
    AddRMSNorm: ScriptableAddRMSNorm,
}


def scriptable(module: RMSNorm) -> nn.Module:
    """The stand-in of a module of this package; a class derived from it has to script by itself."""
    stand_in = _STAND_INS.get(type(module))
    if stand_in is None:
        return module
    twin = copy.copy(module)
    twin.__class__ = stand_in
    return twin
