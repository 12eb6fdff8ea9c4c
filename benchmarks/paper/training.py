"""Training of models that differ in the norm alone, side by side.

Same seeds, same batches, the steps of the models interleaved in random order so that their times
compare.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..harness.timing import Timing, summarise
from .norms import MakeNorm, make_norm

__all__ = ["Trained", "train_side_by_side"]


@dataclass(frozen=True)
class Trained:
    """By norm: the model, the training loss of every step, the Timing of a step.

    A step is forward, backward and Adam; its noise is that of odd against even steps.
    """

    models: dict[str, nn.Module]
    losses: dict[str, list[float]]
    times: dict[str, Timing]


def train_side_by_side(
    make: Callable[[MakeNorm], nn.Module],
    batch: Callable[[torch.Generator], tuple[Tensor, ...]],
    norms: Sequence[str],
    steps: int,
    device: torch.device,
    *,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> Trained:
    """Trains one model per norm, a step of each in turn.

    Args:
        make: the model, whose ``forward(*batch)`` is the loss.
        batch: a training step's tensors, on the CPU.
        norms: names of benchmarks.paper.norms.
        rate: of Adam, reached after 20 steps.
        progress: called after each step of all models.
    """
    models, optimisers = {}, {}
    for norm in norms:
        torch.manual_seed(seed)
        models[norm] = make(make_norm(norm)).to(device)
        optimisers[norm] = torch.optim.Adam(models[norm].parameters(), lr=rate, fused=True)
    losses: dict[str, list[float]] = {norm: [] for norm in norms}
    seconds: dict[str, list[float]] = {norm: [] for norm in norms}
    generator, order = torch.Generator().manual_seed(seed), random.Random(seed)
    turns = list(norms)
    for step in range(steps):
        data = [t.to(device) for t in batch(generator)]
        for group in optimisers.values():
            group.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20)
        order.shuffle(turns)
        for norm in turns:
            start = time.perf_counter()
            loss = models[norm](*data)
            optimisers[norm].zero_grad()
            loss.backward()
            optimisers[norm].step()
            losses[norm].append(loss.item())  # waits for a GPU, too
            seconds[norm].append(time.perf_counter() - start)
        progress()
    skip = min(4, steps // 2)  # the first steps allocate
    times = {n: np.array(s[skip : skip + (steps - skip) // 2 * 2]) for n, s in seconds.items()}
    return Trained(models, losses, {n: summarise(t.reshape(-1, 2), 1) for n, t in times.items()})
