"""Recurrent layers with normalised projections, step by step as the paper's models run them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norms import MakeNorm, normalised

__all__ = ["GRU", "LSTM", "bidirectional"]


def _projection(norm: MakeNorm, inputs: int, outputs: int) -> nn.Module:
    return normalised(norm, outputs, nn.Linear(inputs, outputs, bias=False))


class GRU(nn.Module):
    """Four normalised tensors per step: gates and candidate, of the input and of the state."""

    def __init__(self, norm: MakeNorm, inputs: int, state: int) -> None:
        super().__init__()
        self.state = state
        self.x_gates = _projection(norm, inputs, 2 * state)
        self.x_candidate = _projection(norm, inputs, state)
        self.h_gates = _projection(norm, state, 2 * state)
        self.h_candidate = _projection(norm, state, state)
        self.gate_bias = nn.Parameter(torch.zeros(2 * state))
        self.candidate_bias = nn.Parameter(torch.zeros(state))

    def step(self, x_gates: Tensor, x_candidate: Tensor, h: Tensor) -> Tensor:
        """The next state from the input's projections, [batch, 2 state] and [batch, state]."""
        gates = torch.sigmoid(x_gates + self.h_gates(h) + self.gate_bias)
        reset, keep = gates.chunk(2, -1)
        candidate = torch.tanh(x_candidate + reset * self.h_candidate(h) + self.candidate_bias)
        return torch.lerp(candidate, h, keep)

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        """One step from x [batch, inputs]."""
        return self.step(self.x_gates(x), self.x_candidate(x), h)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """States [batch, time, state] of x [batch, time, inputs], from h or zeros.

        The input's projections do not wait for the state: all steps in one go.
        """
        if h is None:
            h = x.new_zeros(x.size(0), self.state)
        states = []
        projections = (self.x_gates(x).unbind(1), self.x_candidate(x).unbind(1))
        for gates, candidate in zip(*projections, strict=True):
            h = self.step(gates, candidate, h)
            states.append(h)
        return torch.stack(states, 1)


class LSTM(nn.Module):
    """Three normalised tensors per step: input projection, recurrent projection, cell."""

    def __init__(self, norm: MakeNorm, inputs: int, state: int) -> None:
        super().__init__()
        self.state = state
        self.x_gates = _projection(norm, inputs, 4 * state)
        self.h_gates = _projection(norm, state, 4 * state)
        self.cell_norm = norm(state)
        self.gate_bias = nn.Parameter(torch.zeros(4 * state))

    def forward(self, x: Tensor) -> Tensor:
        """States [batch, time, state] of x [batch, time, inputs]."""
        h = c = x.new_zeros(x.size(0), self.state)
        states = []
        for x_gates in self.x_gates(x).unbind(1):
            gates = x_gates + self.h_gates(h) + self.gate_bias
            i, f, o, g = gates.chunk(4, -1)
            c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(self.cell_norm(c))
            states.append(h)
        return torch.stack(states, 1)


def bidirectional(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """States [batch, time, 2 state] of a forward and a backward layer, side by side."""
    forward, backward = layers
    return torch.cat([forward(x), backward(x.flip(1)).flip(1)], -1)
