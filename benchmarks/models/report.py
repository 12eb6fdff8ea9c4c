"""Table and plot from a models.json: ``python -m benchmarks.models.report RESULTS/models.json``.

Everything shown is read from the JSON. Writes models.md and models.png beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.optional import pyplot
from ..harness.results import load
from ..harness.tables import conditions, entries_of, spread, table, times_of, write_each
from ..paper.report import percent, saved
from ..paper.summary import reduction
from .families import FAMILIES
from .timing import COMPILED, EAGER

__all__ = ["main", "plot", "write"]

WORKS = {"prefill": "prefill", "decode": "one token", "train": "training step"}
PAIRS = (EAGER, COMPILED)
BARS = ((-0.18, "eager", EAGER), (0.18, "compiled", COMPILED))  # places in the plot


def times_table(data: dict[str, Any]) -> list[str]:
    """A line per model, dtype and work."""
    header = ["model", "dtype", "work", "original, ms (p20 … p80)", "swapped", "less time"]
    header += ["compiled original", "compiled swapped", "less time, compiled", "noise"]
    rows = []
    for e in entries_of(data, "models"):
        times = times_of(e)
        cells = []
        for original, swapped in PAIRS:
            found = [spread(times[v], 1e3) if v in times else "" for v in (original, swapped)]
            cells += [*found, saved(times, swapped, original)]
        noise = percent(max(t.noise for t in times.values()))
        rows.append([FAMILIES[e["model"]].title, e["dtype"], WORKS[e["work"]], *cells, noise])
    return table(header, rows, 3)


def kept_table(data: dict[str, Any]) -> list[str]:
    """A line per model and dtype: MiB that autograd keeps between forward and backward."""
    header = ["model", "dtype", "original", "swapped", "less", "compiled original"]
    header += ["compiled swapped", "less, compiled"]
    rows = []
    for e in entries_of(data, "models"):
        if "saved" not in e:
            continue
        cells = []
        for original, swapped in PAIRS:
            if original not in e["saved"]:
                cells += ["", "", ""]
                continue
            before, after = e["saved"][original], e["saved"][swapped]
            cells += [f"{before / 2**20:.1f} MiB", f"{after / 2**20:.1f} MiB"]
            cells.append(percent(1 - after / before))
        rows.append([FAMILIES[e["model"]].title, e["dtype"], *cells])
    return table(header, rows, 2) if rows else []


def models_lines(data: dict[str, Any]) -> list[str]:
    """A line per model: what was run of it, and which norms stayed."""
    found = {e["model"]: e for e in entries_of(data, "models")}
    layers = data["options"]["layers"]
    lines = []
    for name, e in found.items():
        family = FAMILIES[name]
        widths = ", ".join(map(str, e["widths"]))
        left = f"; not swapped: {', '.join(e['left'])}" if e["left"] else ""
        lines.append(
            f"- {family.title}: {layers} of {family.published_layers} layers, "
            f"{e['parameters'] / 1e6:.0f} M parameters; {e['norms']} norms of {widths}{left}"
        )
    return lines


def plot(data: dict[str, Any], path: Path) -> None:
    """Percent of the time saved, per model and work, in eager mode and compiled."""
    if (plt := pyplot()) is None:
        return
    dtypes = list(dict.fromkeys(e["dtype"] for e in entries_of(data, "models")))
    rows = list(dict.fromkeys((e["model"], e["work"]) for e in entries_of(data, "models")))
    fig, axes = plt.subplots(
        1,
        len(dtypes),
        figsize=(5 * len(dtypes) + 1, 0.36 * len(rows) + 1.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for offset, label, (original, swapped) in BARS:
            shown = []
            for e in entries_of(data, "models"):
                times = times_of(e)
                if e["dtype"] == dtype and swapped in times:
                    place = rows.index((e["model"], e["work"])) + offset
                    shown.append((place, times[swapped], times[original]))
            if not shown:
                continue
            axis.barh(
                [place for place, _, _ in shown],
                [100 * reduction(ours, theirs) for _, ours, theirs in shown],
                0.34,
                xerr=[100 * max(ours.noise, theirs.noise) for _, ours, theirs in shown],
                label=label,
                error_kw={"linewidth": 0.8},
            )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=dtype, xlabel="% less time with the norms swapped")
    axes[0][0].set_yticks(range(len(rows)), [f"{FAMILIES[m].title}, {WORKS[w]}" for m, w in rows])
    axes[0][0].invert_yaxis()
    axes[0][0].legend(fontsize=8)
    fig.suptitle(conditions(data) + "; whiskers: noise", fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def write(path: Path) -> str:
    """Writes the Markdown and the plot beside the JSON file ``path``; returns the Markdown."""
    data = load(path)
    options = data["options"]
    picture = path.with_suffix(".png")
    lines = [
        "# What a swap of the norms is worth in real models",
        "",
        f"{conditions(data)}, transformers {options['transformers']}.",
        "",
        "Models of transformers with random weights at published widths, but few layers and a "
        "small vocabulary (below): in a whole model the norms' share is a little smaller, since "
        f"its head and embedding are larger. One sequence of {options['length']} tokens. Original: "
        "as transformers has it. Swapped: after replace_rms_norm_. Compiled: torch.compile "
        f"({options['backend']}) of each. All take turns in one process, over the same parameters. "
        "Less time: 1 − swapped / original, medians; “=”: inside the noise.",
        "",
        *times_table(data),
        "",
        f"![time]({picture.name})",
        "",
    ]
    if kept := kept_table(data):
        lines += [
            "Kept for the backward of a training step, parameters not counted:",
            "",
            *kept,
            "",
        ]
    lines += ["Run of each model:", "", *models_lines(data), ""]
    plot(data, picture)
    text = "\n".join(lines)
    path.with_suffix(".md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """``argv``: paths of results files."""
    return write_each(write, argv)


if __name__ == "__main__":
    sys.exit(main())
