"""What each norm learns: the small tasks of tasks.py, several seeds, final metric and curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .tasks import TASKS
from .training import train_side_by_side

__all__ = ["curve", "train_task"]

POINTS = 50  # of a learning curve in the results


def train_task(
    name: str,
    norms: Sequence[str],
    seed: int,
    steps: int,
    device: torch.device,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """One entry of the results: by norm, the held-out metric and the curve of the training loss.

    A metric or a loss that is not finite is None: the model diverged.
    """
    task = TASKS[name]
    trained = train_side_by_side(
        task.model, task.batch, norms, steps, device, rate=task.rate, seed=seed, progress=progress
    )
    held_out = [t.to(device) for t in task.held_out()]
    metric: dict[str, float | None] = {}
    with torch.no_grad():
        for norm, model in trained.models.items():
            diverged = not math.isfinite(trained.losses[norm][-1])
            metric[norm] = None if diverged else _finite(task.score(model.eval(), *held_out))
    return {
        "task": name,
        "seed": seed,
        "steps": steps,
        "metric": metric,
        "curves": {norm: curve(losses) for norm, losses in trained.losses.items()},
    }


def _finite(value: float, digits: int = 5) -> float | None:
    return round(value, digits) if math.isfinite(value) else None


def curve(losses: Sequence[float], points: int = POINTS) -> list[list[float | None]]:
    """[last step, mean loss] of at most ``points`` windows of equal length, in order."""
    window = max(1, math.ceil(len(losses) / points))
    parts = (losses[i : i + window] for i in range(0, len(losses), window))
    end = 0
    found: list[list[float | None]] = []
    for part in parts:
        end += len(part)
        found.append([end, _finite(sum(part) / len(part))])
    return found
