"""The paper's GRU and LSTM: recurrent layers with normalised projections, run step by step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .norms import MakeNorm, normalised

__all__ = ["GRU", "LSTM", "bidirectional"]


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class GRU(nn.Module):
    """Four normalised tensors per step: gates and candidate, of the input and of the state.

    As in the paper's code, the input's projections are computed for all steps at once and
    normalised in the step.
    """

    def __init__(self, norm: MakeNorm, inputs: int, state: int) -> None:
        super().__init__()
        self.state = state
        self.x_gates, self.x_candidate = _linear(inputs, 2 * state), _linear(inputs, state)
        self.x_gates_norm, self.x_candidate_norm = norm(2 * state), norm(state)
        self.h_gates = normalised(norm, 2 * state, _linear(state, 2 * state))
        self.h_candidate = normalised(norm, state, _linear(state, state))
        self.gate_bias = nn.Parameter(torch.zeros(2 * state))
        self.candidate_bias = nn.Parameter(torch.zeros(state))

    def step(self, x_gates: Tensor, x_candidate: Tensor, h: Tensor) -> Tensor:
        """The next state from the input's projections, [batch, 2 state] and [batch, state]."""
        gates = self.x_gates_norm(x_gates) + self.h_gates(h) + self.gate_bias
        reset, keep = torch.sigmoid(gates).chunk(2, -1)
        candidate = self.x_candidate_norm(x_candidate) + reset * self.h_candidate(h)
        return torch.lerp(torch.tanh(candidate + self.candidate_bias), h, keep)

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        """One step from x [batch, inputs]."""
        return self.step(self.x_gates(x), self.x_candidate(x), h)

    def project(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What ``step`` takes, for each step of x [batch, time, inputs]."""
        return zip(_steps(self.x_gates, x), _steps(self.x_candidate, x), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        """States [batch, time, state] of x [batch, time, inputs], from zeros."""
        h = x.new_zeros(x.size(0), self.state)
        states = []
        for gates, candidate in self.project(x):
            h = self.step(gates, candidate, h)
            states.append(h)
        return torch.stack(states, 1)


class LSTM(nn.Module):
    """Three normalised tensors per step: input projection, recurrent projection, cell."""

    def __init__(self, norm: MakeNorm, inputs: int, state: int) -> None:
        super().__init__()
        self.state = state
        self.x_gates, self.x_gates_norm = _linear(inputs, 4 * state), norm(4 * state)
        self.h_gates = normalised(norm, 4 * state, _linear(state, 4 * state))
        self.cell_norm = norm(state)
        self.gate_bias = nn.Parameter(torch.zeros(4 * state))

    def forward(self, x: Tensor) -> Tensor:
        """States [batch, time, state] of x [batch, time, inputs]."""
        h = c = x.new_zeros(x.size(0), self.state)
        states = []
        for x_gates in _steps(self.x_gates, x):
            gates = self.x_gates_norm(x_gates) + self.h_gates(h) + self.gate_bias
            i, f, o, g = gates.chunk(4, -1)
            c = torch.sigmoid(f + 1) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(self.cell_norm(c))
            states.append(h)
        return torch.stack(states, 1)


def _steps(layer: nn.Linear, x: Tensor) -> tuple[Tensor, ...]:
    """[batch, outputs] per step of x [batch, time, inputs]; contiguous: LayerNorm would copy."""
    return layer(x.transpose(0, 1).contiguous()).unbind(0)


def bidirectional(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """States [batch, time, 2 state] of a forward and a backward layer, side by side."""
    forward, backward = layers
    return torch.cat([forward(x), backward(x.flip(1)).flip(1)], -1)
