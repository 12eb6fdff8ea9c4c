"""Layers for ``kernelize``: a forward alone, on the state of the module whose place they take."""

import torch
from torch import nn

from ._ops import ops


class RMSNorm(nn.Module):
    """The norm of the Llama family in transformers, bit for bit."""

    has_backward = True
    can_torch_compile = True

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(
            hidden_states, self.weight, None, self.variance_epsilon, None, 0.0, "llama"
        )


class GemmaRMSNorm(nn.Module):
    """The norm of the Gemma family in transformers: 1 is added to the weight, in fp32."""

    has_backward = True
    can_torch_compile = True

    weight: torch.Tensor
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, None, self.eps, None, 1.0, "torch")
