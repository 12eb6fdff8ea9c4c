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


class RMSNormGated(nn.Module):
    """The norm before a gate of linear attention in transformers.

    Two ways of rounding share the name, and no attribute tells them apart. Qwen3-Next's rounds
    before the weight, as do the others whose gate is silu, but LaraMini; it gets that rounding,
    too. Kimi Linear's, GLM 5's and Bailing's, whose gate is sigmoid, do not.
    """

    has_backward = True
    can_torch_compile = True

    weight: torch.Tensor
    variance_epsilon: float
    activation: str

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        casting_mode = "llama" if self.activation == "silu" else "torch"
        return ops.rms_norm_gated(
            hidden_states,
            gate,
            self.weight,
            None,
            self.activation,
            True,
            self.variance_epsilon,
            None,
            0.0,
            casting_mode,
        )
