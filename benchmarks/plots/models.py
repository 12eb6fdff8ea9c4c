"""What a swap is worth in whole models, and the paper's comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..harness.tables import conditions, entries_of, times_of
from ..harness.timing import Timing
from ..models.families import FAMILIES
from ..models.report import WORKS
from ..paper.models import MODELS
from ..paper.summary import mean_curve, reduction
from ..paper.tasks import TASKS
from .style import CONTENDERS, INK, MACHINE, Source, figure, finish

__all__ = ["PLOTS"]

# Of works: no contenders, and no colour of one.
WORK_COLOURS = {"prefill": "#4c9f9b", "decode": "#d0709a", "train": "#9a8c3c"}
# Name in the paper's results -> contender.
NORMS = {
    "none": "none",
    "layer_norm": "torch_layer_norm",
    "layer_norm_composed": "composed",
    "rms_norm": "rms_norm",
    "prms_norm": "prms_norm",
}


def bars(axis: Any, found: list[tuple[float, Timing, Timing]], height: float, **how: Any) -> None:
    """Percent saved at each place, with the noise as whiskers."""
    axis.barh(
        [place for place, _, _ in found],
        [100 * reduction(ours, theirs) for _, ours, theirs in found],
        height,
        xerr=[100 * min(1.0, max(ours.noise, theirs.noise)) for _, ours, theirs in found],
        error_kw={"linewidth": 1, "ecolor": INK},
        **how,
    )


def models(path: Path) -> None:
    """Time and memory that a swap saves in models of transformers."""
    source = Source(MACHINE / "models.json")
    entries = entries_of(source.data, "models")
    names = list(dict.fromkeys(e["model"] for e in entries))
    fig, axes = figure(1, 3, (9.5, 4.4), sharey=True)
    for axis, dtype in zip(axes[0], ("float32", "bfloat16"), strict=False):
        for j, work in enumerate(WORKS):
            found = [
                (names.index(e["model"]) + (j - 1) * 0.26, times["swapped"], times["original"])
                for e, times in ((e, times_of(e)) for e in entries)
                if (e["dtype"], e["work"]) == (dtype, work)
            ]
            bars(axis, found, 0.24, color=WORK_COLOURS[work], label=f"time: {WORKS[work]}")
        axis.axvline(0, color=INK, linewidth=1)
        axis.set_title("fp32" if dtype == "float32" else "bf16")
        axis.set_xlabel("% less time")
        axis.set_xlim(-8, 8)
    kept = axes[0][2]
    for j, (dtype, colour) in enumerate((("float32", "#b9c2cc"), ("bfloat16", "#6f7b8a"))):
        saving = [e for e in entries if e["dtype"] == dtype and "saved" in e]
        shown = kept.barh(
            [names.index(e["model"]) + (j - 0.5) * 0.36 for e in saving],
            [100 * (1 - e["saved"]["swapped"] / e["saved"]["original"]) for e in saving],
            0.34,
            color=colour,
            label=f"memory: {'fp32' if dtype == 'float32' else 'bf16'}",
        )
        kept.bar_label(shown, fmt="%.0f %%", fontsize=8, color=INK, padding=2)
    kept.set_title("kept for the backward")
    kept.set_xlabel("% less memory")
    axes[0][0].set_yticks(range(len(names)), [FAMILIES[n].title for n in names])
    axes[0][0].invert_yaxis()
    for axis in axes[0]:
        axis.grid(axis="y", visible=False)
    note = (
        "replace_rms_norm_(model) against the model as it is, eager; whiskers: the noise, a bar "
        f"within them is no difference. {conditions(source.data)}"
    )
    finish(fig, path, [source], note, columns=5)


def paper_time(path: Path) -> None:
    """Reductions of a step's time at the published sizes, with the paper's."""
    source = Source(MACHINE / "paper_scale_1.json")
    entries = entries_of(source.data, "time")
    fig, axes = figure(1, 2, (9.5, 3.9), sharey=True)
    opponents = {
        "layer_norm_composed": "against LayerNorm of elementary operations,\nthe paper's",
        "layer_norm": "against torch's fused LayerNorm,\ntoday's",
    }
    for axis, (opponent, title) in zip(axes[0], opponents.items(), strict=True):
        for j, norm in enumerate(("none", "rms_norm", "prms_norm")):
            look = CONTENDERS[NORMS[norm]]
            found = [
                (i + (j - 1) * 0.27, times[norm], times[opponent])
                for i, times in enumerate(map(times_of, entries))
            ]
            bars(axis, found, 0.25, color=look.colour, alpha=0.55 if norm == "none" else 1,
                 label=look.label)  # fmt: skip
            for i, e in enumerate(entries):
                published = MODELS[e["model"]].published
                if opponent == "layer_norm_composed" and published and norm in published:
                    low, high = published[norm]
                    place = i + (j - 1) * 0.27
                    axis.plot([low, high], [place, place], color=INK, marker="|", markersize=10,
                              markeredgewidth=2.2, label="the paper, on its GPUs")  # fmt: skip
        axis.axvline(0, color=INK, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("% less time per training step")
        axis.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(entries)), [MODELS[e["model"]].title for e in entries])
    axes[0][0].invert_yaxis()
    note = f"Published sizes, fp32; whiskers: the noise. {conditions(source.data)}"
    finish(fig, path, [source], note)


def paper_curves(path: Path) -> None:
    """Training loss against step: mean of the seeds."""
    source = Source(MACHINE / "paper.json")
    entries = entries_of(source.data, "quality")
    tasks = list(dict.fromkeys(e["task"] for e in entries))
    fig, axes = figure(2, 3, (9.5, 5.2))
    for axis, task in zip(axes.flat, tasks, strict=True):
        runs = [e for e in entries if e["task"] == task]
        for norm in ("none", "layer_norm", "prms_norm", "rms_norm"):
            look = CONTENDERS[NORMS[norm]]
            label = "LayerNorm" if norm == "layer_norm" else look.label
            curve = mean_curve([e["curves"][norm] for e in runs])
            axis.plot(*zip(*curve, strict=True), color=look.colour, label=label, linewidth=1.3)
        axis.set(title=TASKS[task].title, yscale="log")
    for axis in axes[1]:
        axis.set_xlabel("step")
    for row in axes:
        row[0].set_ylabel("training loss")
    seeds = source.data["options"]["seeds"]
    finish(fig, path, [source], f"Mean of {seeds} seeds. {conditions(source.data)}")


def paper_gradients(path: Path) -> None:
    """Gradients at initialisation against k, the number of elements in pRMSNorm's statistic."""
    source = Source(MACHINE / "paper.json")
    entry = source.data["entries"]["properties/gradients"]
    ks = [int(k) for k in entry["norms"]]
    whole = entry["norms"][str(entry["n"])]["p50"]
    fig, axes = figure(1, 1, (6.4, 3.6))
    axis = axes[0][0]
    for quantile, label, alpha in (
        ("p50", "median", 1),
        ("p99", "99 %", 0.7),
        ("max", "largest", 0.4),
    ):
        values = [v[quantile] / whole for v in entry["norms"].values()]
        axis.plot(ks, values, "o-", color=CONTENDERS["prms_norm"].colour, alpha=alpha, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.set_xlabel(f"k: elements in the statistic, of {entry['n']}")
    axis.set_ylabel("|dL/dx|, over RMSNorm's median")
    note = f"{entry['layers']} layers relu(norm(W h)) at initialisation. {conditions(source.data)}"
    finish(fig, path, [source], note)


PLOTS = {
    "models": models,
    "paper-time": paper_time,
    "paper-curves": paper_curves,
    "paper-gradients": paper_gradients,
}
