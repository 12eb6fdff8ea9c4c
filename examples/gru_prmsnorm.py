"""A GRU with pRMSNorm in a plain training loop, as in the paper's recurrent models.

    python examples/gru_prmsnorm.py            # a minute or two on two cores
    python examples/gru_prmsnorm.py --small    # seconds

Every projection of a step is normalised, by a statistic of the first 6.25 % of its elements. The
task needs no download: say a sequence of symbols again, after its end.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_rmsnorm import PRMSNorm

SYMBOLS = 8
END = SYMBOLS  # asks for the answer


class NormalisedGRU(nn.Module):
    """States [batch, time, state] of x [batch, time, inputs]."""

    def __init__(self, inputs: int, state: int) -> None:
        super().__init__()
        self.state = state
        self.of_input = nn.Linear(inputs, 3 * state)
        self.of_state = nn.Linear(state, 3 * state, bias=False)
        self.input_norm, self.state_norm = PRMSNorm(3 * state), PRMSNorm(3 * state)

    def forward(self, x: Tensor) -> Tensor:
        # The inputs of all steps at once: one call of the norm. The state's norm is in the loop.
        projected = self.input_norm(self.of_input(x)).unbind(1)
        h = x.new_zeros(x.size(0), self.state)
        states = []
        for step in projected:
            of_state = self.state_norm(self.of_state(h))
            reset, keep = torch.sigmoid((step + of_state)[:, : 2 * self.state]).chunk(2, -1)
            candidate = step[:, 2 * self.state :] + reset * of_state[:, 2 * self.state :]
            h = torch.lerp(torch.tanh(candidate), h, keep)
            states.append(h)
        return torch.stack(states, 1)


class Repeat(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS + 1, width)
        self.gru = NormalisedGRU(width, width)
        self.answer = nn.Linear(width, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits of the answer, [batch, time, SYMBOLS], where ``symbols`` stand before END."""
        asked = F.pad(symbols, (0, symbols.size(1)), value=END)
        return self.answer(self.gru(self.symbols(asked))[:, symbols.size(1) :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of minutes")
    small = parser.parse_args().small
    width, length, steps = (64, 3, 40) if small else (256, 6, 600)

    torch.manual_seed(0)
    model = Repeat(width)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    start = time.perf_counter()
    for step in range(steps):
        symbols = torch.randint(SYMBOLS, (64, length))
        loss = F.cross_entropy(model(symbols).flatten(0, 1), symbols.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        if step % max(1, steps // 6) == 0:
            print(f"step {step:4d}  loss {losses[-1]:.3f}")
    each = 1e3 * (time.perf_counter() - start) / steps
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {each:.1f} ms per step")


if __name__ == "__main__":
    main()
