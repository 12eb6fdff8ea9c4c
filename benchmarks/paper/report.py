"""Tables and plots from a paper.json: ``python -m benchmarks.paper.report RESULTS/paper.json``.

Everything measured is read from the JSON; the paper's own figures stand in models/__init__.py.
Writes paper.md, paper_time.png, paper_curves.png and paper_gradients.png beside it, for
paper_scale_1.json paper_scale_1.md and so on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fused_rmsnorm._columns import stat_columns

from ..harness.results import load
from ..harness.tables import conditions, entries_of, times_of, write_each
from ..harness.timing import Timing, speedup
from .models import MODELS
from .norms import LABELS, PARTIAL
from .plots import plot_curves, plot_gradients, plot_reductions
from .properties import INVARIANT
from .step_time import OPTIMISER
from .summary import reduction, spread
from .tasks import TASKS

OURS = ("rms_norm", "prms_norm")
OPPONENTS = {"layer_norm": "native LayerNorm", "layer_norm_composed": "the paper's LayerNorm"}


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def saved(times: dict[str, Timing], ours: str, theirs: str) -> str:
    """Share of the step's time saved; "=" inside the noise, "" where one of them was not run."""
    if ours not in times or theirs not in times or ours == theirs:
        return ""
    if speedup(times[ours], times[theirs]) is None:
        return "="
    value = reduction(times[ours], times[theirs])
    return percent(value) if value > 0 else f"{percent(-value)} slower"


def published(model: str, ours: str) -> str:
    """The paper's reduction for this model."""
    figures = MODELS[model].published
    if figures is None or ours not in figures:
        return ""
    low, high = figures[ours]
    return f"{low:g} %" if low == high else f"{low:g} … {high:g} %"


def share(entry: dict[str, Any], norm: str) -> str:
    return percent(entry["shares"][norm]["share"]) if norm in entry["shares"] else ""


def per_norm(entry: dict[str, Any]) -> str:
    """Own time of one norm, for those that were profiled."""
    return " / ".join(f"{found['microseconds']:.1f}" for found in entry["shares"].values())


# -- time -----------------------------------------------------------------------------------------


def reductions_table(data: dict[str, Any]) -> list[str]:
    """A line per model: what each of ours saves of a step against both LayerNorms."""
    head = ["model", "LayerNorm's share", "RMSNorm's share", "µs per norm", "no norm at all"]
    for opponent in OPPONENTS.values():
        head += [f"RMSNorm against {opponent}", f"pRMSNorm against {opponent}"]
    head += ["paper: RMSNorm", "paper: pRMSNorm"]
    lines = [row(*head), "|---|" + "--:|" * (len(head) - 1)]
    for e in entries_of(data, "time"):
        times = times_of(e)
        cells = [MODELS[e["model"]].title, share(e, "layer_norm"), share(e, "rms_norm")]
        cells.append(per_norm(e))
        cells.append(saved(times, "none", "layer_norm"))
        cells += [saved(times, ours, opponent) for opponent in OPPONENTS for ours in OURS]
        cells += [published(e["model"], ours) for ours in OURS]
        lines.append(row(*cells))
    return lines


def remarks(data: dict[str, Any]) -> list[str]:
    """A sentence for each model where RMSNorm is not faster or ours save less than the paper's."""
    found = []
    for e in entries_of(data, "time"):
        times, title = times_of(e), MODELS[e["model"]].title
        if "rms_norm" in times and "layer_norm" in times:
            text = against_native(e, times)
            found += [f"- {title}: {text}"] if text else []
        for ours in OURS:
            if {ours, "layer_norm_composed", "none"} <= times.keys():
                text = against_paper(e["model"], ours, times)
                found += [f"- {title}: {text}"] if text else []
    return found


def against_native(entry: dict[str, Any], times: dict[str, Timing]) -> str:
    """Why RMSNorm does not win, or ""."""
    ours, theirs = times["rms_norm"], times["layer_norm"]
    ratio, noise = speedup(ours, theirs), max(ours.noise, theirs.noise)
    if ratio is not None and ratio > 1:
        return ""
    layer_norm, rms_norm = (
        entry["shares"].get(name, {}).get("share", math.nan) for name in ("layer_norm", "rms_norm")
    )
    shares = f"LayerNorm is {percent(layer_norm)} of its step and RMSNorm {percent(rms_norm)}"
    if ratio is None:
        return (
            f"no difference from native LayerNorm beyond the noise of {percent(noise)}: {shares} "
            "by the profiler, and only their difference can be saved."
        )
    loss = percent(ours.median / theirs.median - 1)
    return f"RMSNorm is {loss} slower than native LayerNorm, noise {percent(noise)}: {shares}."


def against_paper(model: str, ours: str, times: dict[str, Timing]) -> str:
    """Why nothing is saved against the paper's LayerNorm, or less than in the paper, or ""."""
    figures, theirs = MODELS[model].published, times["layer_norm_composed"]
    if figures is None or ours not in figures:
        return ""
    if speedup(times[ours], theirs) is None:
        noise = max(times[ours].noise, theirs.noise)
        return (
            f"no difference of {LABELS[ours]} from the paper's LayerNorm beyond the noise of "
            f"{percent(noise)}; in the paper it saves {published(model, ours)}."
        )
    value = reduction(times[ours], theirs)
    if 100 * value >= figures[ours][0]:
        return ""
    most = reduction(times["none"], theirs)
    return (
        f"against the paper's LayerNorm {LABELS[ours]} saves {percent(value)}, in the paper "
        f"{published(model, ours)}; leaving the norms out altogether saves {percent(most)} here."
    )


def times_table(data: dict[str, Any]) -> list[str]:
    """A line per model and norm."""
    lines = [
        row(
            "model",
            "norm",
            "ms per step (p20 … p80)",
            "noise",
            *(f"less than {name}" for name in OPPONENTS.values()),
        ),
        "|---|---|--:|--:|--:|--:|",
    ]
    for e in entries_of(data, "time"):
        times = times_of(e)
        for norm, t in times.items():
            label = "(Adam alone)" if norm == OPTIMISER else LABELS[norm]
            ms = f"{t.median * 1e3:.2f} ({t.p20 * 1e3:.2f} … {t.p80 * 1e3:.2f})"
            compared = [
                "" if norm == OPTIMISER else saved(times, norm, opponent) for opponent in OPPONENTS
            ]
            title = MODELS[e["model"]].title
            lines.append(row(title, label, ms, percent(t.noise), *compared))
    return lines


def sizes_lines(data: dict[str, Any]) -> list[str]:
    lines = []
    for e in entries_of(data, "time"):
        sizes = ", ".join(f"{key} {value}" for key, value in e["sizes"].items())
        calls = max((s["calls"] for s in e["shares"].values()), default=0)
        counted = f"; {calls:.0f} norms per step" if calls else ""
        lines.append(f"- {MODELS[e['model']].title}: {sizes}{counted}")
    return lines


def time_section(data: dict[str, Any], plot: str) -> list[str]:
    options = data["options"]
    return [
        "## Time per training step",
        "",
        f"Forward, loss, backward and Adam, fp32, scale {options['scale']:g} of batch, length and "
        "vocabulary (sizes below; widths are the published ones), all norms in one process, in "
        "turn. "
        "Reductions: 1 − time / time of that LayerNorm, medians; “=”: inside the noise. Adam's "
        "part of a step, which no norm changes, stands in the second table. Share: own time of the "
        "norm's operators, forward and backward, in that of all, by torch.profiler; µs per norm: "
        "that time for one norm, of LayerNorm / RMSNorm / pRMSNorm, on a CPU with what the host "
        "does for it. “No norm at all”: what a norm that cost nothing would save against native "
        "LayerNorm. The paper's "
        "LayerNorm is composed of elementary operations, and the paper's figures were measured "
        "against such a one on a TITAN X (Pascal) and a V100. pRMSNorm reads every element to "
        "scale it, as RMSNorm does, and its shorter sum saves little beside that.",
        "",
        *reductions_table(data),
        "",
        *remarks(data),
        "",
        f"![time]({plot})",
        "",
        *times_table(data),
        "",
        "Sizes:",
        "",
        *sizes_lines(data),
        "",
    ]


# -- quality --------------------------------------------------------------------------------------


def quality_table(data: dict[str, Any]) -> list[str]:
    """A line per task: mean ± standard deviation over the seeds, per norm."""
    entries = entries_of(data, "quality")
    norms = list(dict.fromkeys(norm for e in entries for norm in e["metric"]))
    lines = [
        row("task", "metric", "steps", *(LABELS[n] for n in norms)),
        "|---|---|--:|" + "--:|" * len(norms),
    ]
    for name in dict.fromkeys(e["task"] for e in entries):
        runs, task = [e for e in entries if e["task"] == name], TASKS[name]
        metric = f"{task.metric}, {task.better} is better"
        cells = [quality_cell([e["metric"].get(norm) for e in runs]) for norm in norms]
        lines.append(row(task.title, metric, str(runs[0]["steps"]), *cells))
    return lines


def quality_cell(values: Sequence[float | None]) -> str:
    s = spread(values)
    if not s.runs:
        return "diverged"
    digits = 2 if s.mean >= 10 else 3
    text = f"{s.mean:.{digits}f} ± {s.deviation:.{digits}f}"
    return f"{text} ({s.diverged} of {s.runs + s.diverged} diverged)" if s.diverged else text


def widths_line() -> str:
    """What p means in these tasks."""
    parts = []
    for task in TASKS.values():
        ks = " / ".join(str(stat_columns(PARTIAL["prms_norm"], n)) for n in task.widths)
        parts.append(f"{task.title} {ks} of {' / '.join(map(str, task.widths))}")
    return (
        "Small models make p = 6.25 % a handful of elements, and few elements make steps unsteady "
        f"(below): {'; '.join(parts)}. The paper's transformer has 32 of 512."
    )


def quality_section(data: dict[str, Any], plot: str) -> list[str]:
    return [
        "## Quality",
        "",
        f"Held-out metric, mean ± standard deviation over {data['options']['seeds']} seeds; the "
        "same batches, rate (Adam) and initial weights for every norm, and no tuning per norm. "
        "Differences of the size of the deviations are none.",
        "",
        *quality_table(data),
        "",
        widths_line(),
        "",
        f"![learning curves]({plot})",
        "",
    ]


# -- properties -----------------------------------------------------------------------------------


def invariance_table(entry: dict[str, Any]) -> list[str]:
    """A line per change; where Table 1 says that the output stays, the cell says so."""
    norms = list(INVARIANT)
    lines = [row("change", *(LABELS[n] for n in norms)), "|---|" + "--:|" * len(norms)]
    for change, values in entry["change"].items():
        cells = [
            f"{values[n]:.1e}" + (" (invariant)" if change in INVARIANT[n] else "") for n in norms
        ]
        lines.append(row(change, *cells))
    return lines


def gradients_table(entry: dict[str, Any]) -> list[str]:
    """A line per k; relative to the median of RMSNorm, which is k = n."""
    lines = [row("k", "p", "median", "99 %", "largest"), "|--:|--:|--:|--:|--:|"]
    unit = entry["norms"][str(entry["n"])]["p50"]
    for k, values in entry["norms"].items():
        cells = [f"{values[q] / unit:.3g}" for q in ("p50", "p99", "max")]
        lines.append(row(k, f"{100 * int(k) / entry['n']:.4g} %", *cells))
    return lines


def properties_section(data: dict[str, Any], plot: str) -> list[str]:
    invariance = data["entries"]["properties/invariance"]
    gradients = data["entries"]["properties/gradients"]
    return [
        "## Properties",
        "",
        "The paper's Table 1: relative change of norm(x Wᵀ), |y' − y| / |y|, fp32, "
        f"{invariance['inputs']} inputs, {invariance['outputs']} outputs, eps "
        f"{invariance['eps']:g}. “Invariant”: by the mathematics with eps = 0; what is left is eps "
        "and rounding. The last line shows where eps ends it.",
        "",
        *invariance_table(invariance),
        "",
        f"Gradients at initialisation of {gradients['layers']} layers relu(norm(W h)) of "
        f"{gradients['n']}: |dL/dx| of a case over {gradients['nets']} networks of "
        f"{gradients['rows']} cases, as a multiple of RMSNorm's median. Few elements in the "
        "statistic make the largest explode, as the paper remarks.",
        "",
        *gradients_table(gradients),
        "",
        f"![gradients]({plot})",
        "",
    ]


def write(path: Path) -> str:
    """Writes the Markdown and the plots beside the JSON file ``path``; returns the Markdown."""
    data = load(path)
    lines = ["# The paper's models and claims", "", f"{conditions(data)}.", ""]
    time, curves, gradients = (
        path.with_name(f"{path.stem}_{name}.png") for name in ("time", "curves", "gradients")
    )
    if entries_of(data, "time"):
        lines += time_section(data, time.name)
        plot_reductions(data, time)
    if entries_of(data, "quality"):
        lines += quality_section(data, curves.name)
        plot_curves(data, curves)
    if "properties/gradients" in data["entries"]:
        lines += properties_section(data, gradients.name)
        plot_gradients(data, gradients)
    text = "\n".join(lines)
    (path.parent / f"{path.stem}.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """``argv``: paths of results files."""
    return write_each(write, argv)


if __name__ == "__main__":
    sys.exit(main())
