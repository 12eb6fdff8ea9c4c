"""T5's norm, whose rounding follows the type of its weight: what a swap puts in its place."""

# No `from __future__ import annotations`: TorchScript evaluates a class's annotations, not strings.
from typing import Optional

import torch
from torch import Tensor

from .. import functional
from .._ops import ops
from ..modules import STAND_INS, RMSNorm
from ..nested import of_each_sequence

__all__ = ["WeightTypedRMSNorm"]


class WeightTypedRMSNorm(RMSNorm):
    """T5's rule: x * r is rounded if the weight is of a half type, and to that type."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.is_nested:
            return of_each_sequence(self.forward, x, len(self.normalized_shape))
        weight_type = self.weight.dtype
        half = weight_type in (torch.float16, torch.bfloat16)
        if x.dtype == weight_type or not half:
            return super().forward(x.to(torch.promote_types(x.dtype, weight_type)))
        shape = tuple(self.normalized_shape)
        return functional.rms_norm(x.float(), shape, None, self.eps).to(weight_type) * self.weight


class ScriptableWeightTypedRMSNorm(WeightTypedRMSNorm):
    """What torch.jit.script compiles in its place, as in fused_rmsnorm.scripting."""

    weight: Tensor  # type: ignore[assignment]
    bias: Optional[Tensor]  # type: ignore[assignment]  # noqa: UP045
    weight_offset: float

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return super().forward(x)
        weight = self.weight
        half = weight.dtype == torch.float16 or weight.dtype == torch.bfloat16
        if x.dtype == weight.dtype or not half:
            wide = x.to(torch.promote_types(x.dtype, weight.dtype))
            return ops.rms_norm(
                wide, weight, self.bias, self.eps, None, self.weight_offset, self.casting_mode
            )
        h = ops.rms_norm(x.float(), None, None, self.eps, None, 0.0, "torch")
        return h.to(weight.dtype) * weight


STAND_INS[WeightTypedRMSNorm] = ScriptableWeightTypedRMSNorm
