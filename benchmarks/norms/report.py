"""Tables and plots from a results file: ``python -m benchmarks.norms.report RESULTS/norms.json``.

Everything shown is read from the JSON; nothing is measured here. Writes a .md file of the same name
beside it (and speed.png and learning.png from norms.json). A ratio inside the noise is "=" in a
table and a hollow mark at 1 in a plot; a column that no row fills, such as that of a peer that was
not run, is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..harness.optional import pyplot
from ..harness.results import load
from ..harness.tables import conditions, entries_of, ratio, spread, table, times_of, write_each
from ..harness.timing import Timing, speedup
from ..plots.style import COLOURS

LABELS = {
    "add_rms_norm": "add_rms_norm (ours)",
    "rms_norm": "RMSNorm (ours)",
    "prms_norm": "pRMSNorm 6.25 % (ours)",
    "layer_norm": "LayerNorm",
    "torch_layer_norm": "F.layer_norm",
    "torch_rms_norm": "F.rms_norm",
    "compiled_rms_norm": "compiled F.rms_norm",
}
OTHERS = ("liger", "quack", "flash_attn", "flashinfer", "onnxruntime", "openvino")
PEERS = ("torch_layer_norm", "torch_rms_norm", "compiled_rms_norm")


def row_name(e: dict[str, Any]) -> str:
    """Rows and N of an entry, and what makes it a variant: see norms/cases.py."""
    name = f"{e['rows']} × {e['n']}"
    name += ", fp32 weight" if e.get("weight", "same") == "float32" else ""
    return name + (", packed QKV" if e.get("layout", "contiguous") == "packed" else "")


def best_other(times: dict[str, Timing]) -> str:
    """The ratio to the fastest of the other projects' kernels, and which; "" where none was run."""
    names = [name for name in OTHERS if name in times]
    if not names:
        return ""
    best = min(names, key=lambda name: times[name].median)
    return f"{ratio(times, best)} {best}"


def copy_share(entry: dict[str, Any], times: dict[str, Timing], copy: str, ours: str) -> str:
    """Bytes per second of ours over those of a copy."""
    if copy not in times:
        return ""
    speed = entry["bytes"] / times[ours].median
    return f"{speed / (entry['copy_bytes'] / times[copy].median):.0%}"


def speed_table(data: dict[str, Any], kind: str = "speed") -> list[str]:
    """A line per case: time, bytes per second, shares of copies, ratios to the peers.

    ``kind``: "speed", or "add" for the residual add and the norm in one pass.
    """
    ours = "add_rms_norm" if kind == "add" else "rms_norm"
    header = [
        *("rows × N", "dtype", "direction", "fits in", "threads", "µs (p20 … p80)", "GB/s"),
        *("of clone", "of memcpy", "of NT copy"),
        *("add, ours", "F.layer_norm", "F.rms_norm", "compiled", "best other", "pRMSNorm"),
    ]
    rows = []
    for e in entries_of(data, kind):
        times = times_of(e)
        t = times[ours]
        rows.append(
            [
                row_name(e),
                e["dtype"],
                e["direction"],
                e.get("fits", ""),
                str(e["threads"]),
                spread(t, 1e6),
                f"{e['bytes'] / t.median / 1e9:.1f}",
                *(copy_share(e, times, copy, ours) for copy in ("clone", "memcpy", "nt_copy")),
                ratio(times, "rms_norm", ours) if kind == "add" else "",
                *(ratio(times, peer, ours) for peer in PEERS),
                best_other(times),
                ratio(times, "rms_norm", "prms_norm") if kind == "speed" else "",
            ]
        )
    return table(header, rows, 4)


def failures(data: dict[str, Any]) -> list[str]:
    """What could not be timed: a line per contender and error, with the first case of it."""
    cases: dict[tuple[str, str], list[str]] = {}
    for e in (*entries_of(data, "speed"), *entries_of(data, "add")):
        case = f"{row_name(e)} {e['dtype']} {e['direction']}"
        for name, error in e.get("failed", {}).items():
            cases.setdefault((LABELS.get(name, name), error), []).append(case)
    return [
        f"- {name}, {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}: {error}"
        for (name, error), found in cases.items()
    ]


def latency_table(data: dict[str, Any]) -> list[str]:
    """Host time of a 1 × 128 call in microseconds."""
    names = ("rms_norm", "prms_norm", "torch_layer_norm", "torch_rms_norm")
    rows = [
        [e["kind"], e["mode"], *(f"{times_of(e)[n].median * 1e6:.2f}" for n in names)]
        for e in entries_of(data, "latency")
    ]
    return table(["1 × 128", "mode", *(LABELS[n] for n in names)], rows, 2)


def memory_table(data: dict[str, Any], what: str) -> list[str]:
    """Bytes, and over the input's; ``what``: "saved" for the backward, or "peak" of a step."""
    names = ("add_rms_norm", "rms_norm", "prms_norm", *PEERS)

    def cell(e: dict[str, Any], name: str) -> str:
        if name not in e[what]:
            return ""
        return f"{e[what][name] / 1024:,.0f} KiB ({e[what][name] / e['input_bytes']:.3f})"

    rows = [
        [
            f"{e['rows']} × {e['n']}",
            e["dtype"],
            {"speed": "norm", "add": "add, norm"}[e["kind"]],
            *(cell(e, name) for name in names),
        ]
        for e in entries_of(data, "memory")
        if e[what]
    ]
    header = ["rows × N", "dtype", "operation", *(LABELS[n] for n in names)]
    return table(header, rows, 3) if rows else []


def learning_table(data: dict[str, Any]) -> list[str]:
    """Step time and held-out loss per model and norm."""
    rows = []
    for e in entries_of(data, "learning"):
        times = times_of(e)
        for name, t in times.items():
            against = "" if name == "layer_norm" else ratio(times, "layer_norm", name)
            loss = f"{e['held_out'][name]:.3f}"
            rows.append([e["model"], LABELS[name], spread(t, 1e3), against, loss])
    header = ["model", "norm", "ms per step (p20 … p80)", "LayerNorm / it", "held-out loss"]
    return table(header, rows, 2)


def plot_speed(data: dict[str, Any], path: Path) -> None:
    """Ratio of F.layer_norm's, F.rms_norm's and compiled time to ours, per case."""
    if (plt := pyplot()) is None:
        return
    cases = entries_of(data, "speed")
    fig, axis = plt.subplots(figsize=(9, 0.32 * len(cases) + 1.2), layout="constrained")
    for offset, peer in enumerate(PEERS):
        points = [
            (speedup(times["rms_norm"], times[peer]), i + (offset - 1) * 0.2)
            for i, times in enumerate(map(times_of, cases))
            if peer in times
        ]
        for inside in (False, True):  # the noise
            chosen = [(r or 1.0, y) for r, y in points if (r is None) == inside]
            color = COLOURS[peer]
            axis.scatter(
                [r for r, _ in chosen],
                [y for _, y in chosen],
                s=22,
                edgecolors=color,
                facecolors="none" if inside else color,
                label=None if inside or not points else LABELS[peer],
            )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    several = len({e["threads"] for e in cases}) > 1
    names = [
        f"{row_name(e).replace(' × ', '×')} {e['dtype']} {e['direction']}"
        + (f" {e['threads']}t" if several else "")
        for e in cases
    ]
    axis.set_yticks(range(len(cases)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time of the peer / time of ours (right of the line: ours is faster)")
    axis.set_title(conditions(data), fontsize=9)
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_learning(data: dict[str, Any], path: Path) -> None:
    """Training loss against step and against time, per model."""
    if (plt := pyplot()) is None:
        return
    models = entries_of(data, "learning")
    fig, axes = plt.subplots(
        len(models), 2, figsize=(9, 3.2 * len(models)), squeeze=False, layout="constrained"
    )
    for e, (by_step, by_time) in zip(models, axes, strict=True):
        for name, losses in e["losses"].items():
            window = max(1, len(losses) // 30)
            smooth = [
                sum(losses[max(0, i - window) : i + 1]) / len(losses[max(0, i - window) : i + 1])
                for i in range(len(losses))
            ]
            step = times_of(e)[name].median
            by_step.plot(smooth, color=COLOURS[name], label=LABELS[name], linewidth=1.2)
            seconds = [i * step for i in range(len(smooth))]
            by_time.plot(seconds, smooth, color=COLOURS[name], linewidth=1.2)
        by_step.set(title=e["model"], xlabel="step", ylabel="training loss")
        by_time.set(title=e["model"], xlabel="seconds (median step)")
        by_step.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def write(path: Path) -> str:
    """Writes norms.md and the plots beside the JSON file ``path``; returns the Markdown."""
    data = load(path)
    parts = [
        f"{conditions(data)}. Ratios: time of the peer over time of ours, above 1 ours is faster; "
        '"=" is inside the noise.',
    ]

    def add(kind: str, title: str, lines: Callable[[dict[str, Any]], list[str]]) -> None:
        if entries_of(data, kind) and (found := lines(data)):
            parts.extend(["", title, "", *found])

    add(
        "speed",
        "The norm alone. GB/s: minimal bytes. pRMSNorm: time of our RMSNorm over it. Fits in: the "
        "smallest cache, by the sizes that the system reports, that holds what the calls touch.",
        speed_table,
    )
    add(
        "add",
        "Residual add and norm in one pass, against the add and each norm after it:",
        lambda data: speed_table(data, "add"),
    )
    if failed := failures(data):
        parts.extend(["", "Not timed, and why:", "", *failed])
    add("latency", "Host time of one call, µs:", latency_table)
    add(
        "memory",
        "Kept for the backward, inputs and parameters not counted (over the input's bytes):",
        lambda data: memory_table(data, "saved"),
    )
    add("memory", "Peak of a step, likewise:", lambda data: memory_table(data, "peak"))
    add(
        "learning",
        "Character language models on the standard library's sources:",
        learning_table,
    )
    if entries_of(data, "speed"):
        plot_speed(data, path.parent / "speed.png")
    if entries_of(data, "learning"):
        plot_learning(data, path.parent / "learning.png")
    text = "\n".join(parts) + "\n"
    (path.parent / f"{path.stem}.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """``argv``: paths of results files."""
    return write_each(write, argv)


if __name__ == "__main__":
    sys.exit(main())
