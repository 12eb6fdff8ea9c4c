"""Plots of a paper.json: reductions of step time, learning curves, gradients at small k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.optional import pyplot
from ..harness.tables import conditions, entries_of, times_of
from ..harness.timing import Timing
from ..plots.style import COLOURS
from .models import MODELS
from .norms import LABELS
from .summary import mean_curve, reduction
from .tasks import TASKS

__all__ = ["plot_curves", "plot_gradients", "plot_reductions"]


def plot_reductions(data: dict[str, Any], path: Path) -> None:
    """Percent of the step's time saved against both LayerNorms, per model, with the paper's."""
    if (plt := pyplot()) is None:
        return
    entries = entries_of(data, "time")
    fig, axes = plt.subplots(
        1, 2, figsize=(10, 0.5 * len(entries) + 1.8), sharey=True, layout="constrained"
    )
    opponents = (("layer_norm", "native LayerNorm"), ("layer_norm_composed", "paper's LayerNorm"))
    for axis, (opponent, title) in zip(axes, opponents, strict=True):
        for offset, ours in ((-0.17, "rms_norm"), (0.17, "prms_norm")):
            shown = [
                (i + offset, times[ours], times[opponent])
                for i, times in enumerate(map(times_of, entries))
                if ours in times and opponent in times
            ]
            _bars(axis, shown, ours)
            if opponent == "layer_norm_composed":
                _published(axis, entries, ours, offset)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"% less time per step than with the {title}")
    axes[0].set_yticks(range(len(entries)), [MODELS[e["model"]].title for e in entries])
    axes[0].invert_yaxis()
    handles, labels = axes[1].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    fig.suptitle(conditions(data) + "; whiskers: noise", fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _bars(axis: Any, shown: Sequence[tuple[float, Timing, Timing]], name: str) -> None:
    if shown:
        widths = [100 * reduction(ours, theirs) for _, ours, theirs in shown]
        noise = [100 * max(ours.noise, theirs.noise) for _, ours, theirs in shown]
        places = [place for place, _, _ in shown]
        look = {"color": COLOURS[name], "label": LABELS[name], "error_kw": {"linewidth": 0.8}}
        axis.barh(places, widths, 0.32, xerr=noise, **look)


def _published(axis: Any, entries: Sequence[dict[str, Any]], ours: str, offset: float) -> None:
    label: str | None = "the paper, its GPU" if ours == "rms_norm" else None
    for i, entry in enumerate(entries):
        published = MODELS[entry["model"]].published
        if published:
            low, high = published[ours]
            axis.plot([low, high], [i + offset] * 2, "k|-", markersize=11, label=label)
            label = None


def plot_curves(data: dict[str, Any], path: Path) -> None:
    """Training loss against step, mean over the seeds, per task."""
    if (plt := pyplot()) is None:
        return
    entries = entries_of(data, "quality")
    tasks = list(dict.fromkeys(e["task"] for e in entries))
    rows = math.ceil(len(tasks) / 2)
    fig, axes = plt.subplots(rows, 2, figsize=(10, 3.3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        runs = [e for e in entries if e["task"] == task]
        for norm in runs[0]["curves"]:
            curve = mean_curve([e["curves"][norm] for e in runs])
            look = {"color": COLOURS[norm], "label": LABELS[norm], "linewidth": 1.2}
            axis.plot(*zip(*curve, strict=True), **look)
        axis.set(title=TASKS[task].title, xlabel="step", ylabel="training loss", yscale="log")
    axes.flat[0].legend(fontsize=7)
    fig.suptitle(f"{conditions(data)}, {data['options']['seeds']} seeds", fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_gradients(data: dict[str, Any], path: Path) -> None:
    """Quantiles of |dL/dx| against k, both logarithmic."""
    if (plt := pyplot()) is None:
        return
    entry = data["entries"]["properties/gradients"]
    ks = [int(k) for k in entry["norms"]]
    fig, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for quantile, label in (("p50", "median"), ("p99", "99 %"), ("max", "largest")):
        axis.plot(ks, [v[quantile] for v in entry["norms"].values()], "o-", label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set(xlabel=f"k, of {entry['n']} elements", ylabel="|dL/dx| of a case")
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)
