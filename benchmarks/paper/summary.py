"""The numbers that the report makes from what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..harness.timing import Timing

__all__ = ["Spread", "mean_curve", "reduction", "spread"]


def reduction(ours: Timing, theirs: Timing) -> float:
    """1 - ours / theirs, by the medians: the paper's figure; negative where ours is slower."""
    return 1 - ours.median / theirs.median


@dataclass(frozen=True)
class Spread:
    """Of the runs that did not diverge: mean, standard deviation (of one run: 0), extremes."""

    mean: float
    deviation: float
    low: float
    high: float
    runs: int
    diverged: int


def spread(values: Sequence[float | None]) -> Spread:
    """``values``: the final metric of each seed; None: diverged."""
    kept = [v for v in values if v is not None]
    diverged = len(values) - len(kept)
    if not kept:
        return Spread(math.nan, math.nan, math.nan, math.nan, 0, diverged)
    deviation = statistics.stdev(kept) if len(kept) > 1 else 0.0
    return Spread(statistics.fmean(kept), deviation, min(kept), max(kept), len(kept), diverged)


def mean_curve(curves: Sequence[Sequence[Sequence[float | None]]]) -> list[tuple[float, float]]:
    """(step, mean loss over the seeds); NaN where a seed's loss was not finite."""
    points = []
    for at_step in zip(*curves, strict=True):
        losses = [loss for _, loss in at_step]
        finite = [loss for loss in losses if loss is not None]
        step = at_step[0][0]
        assert step is not None
        points.append((step, statistics.fmean(finite) if finite == losses else math.nan))
    return points
