"""Tables and plots from a results file: ``python -m benchmarks.report RESULTS/norms.json``.

Everything shown is read from the JSON; nothing is measured here. Writes norms.md, speed.png and
learning.png beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .harness import Timing, load, speedup

LABELS = {
    "rms_norm": "RMSNorm (ours)",
    "prms_norm": "pRMSNorm 6.25 % (ours)",
    "layer_norm": "LayerNorm",
    "torch_layer_norm": "F.layer_norm",
    "torch_rms_norm": "F.rms_norm",
    "compiled_rms_norm": "compiled F.rms_norm",
}
OTHERS = ("liger", "quack", "flash_attn", "flashinfer")
PEERS = ("torch_layer_norm", "torch_rms_norm", "compiled_rms_norm")


def times_of(entry: dict[str, Any]) -> dict[str, Timing]:
    """name -> Timing of one entry."""
    return {name: Timing.from_json(t) for name, t in entry["times"].items()}


def entries_of(data: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """The entries whose key starts with ``kind``."""
    return [e for key, e in data["entries"].items() if key.startswith(f"{kind}/")]


def ratio(times: dict[str, Timing], peer: str, ours: str = "rms_norm") -> str:
    """How many times faster ours is; "=" inside the noise, "" where the peer was not run."""
    if peer not in times:
        return ""
    value = speedup(times[ours], times[peer])
    return "=" if value is None else f"{value:.2f}×"


def best_other(times: dict[str, Timing]) -> str:
    """The ratio to the fastest of the other projects' kernels, and which; "" where none was run."""
    names = [name for name in OTHERS if name in times]
    if not names:
        return ""
    best = min(names, key=lambda name: times[name].median)
    return f"{ratio(times, best)} {best}"


def copy_share(entry: dict[str, Any], times: dict[str, Timing], copy: str) -> str:
    """Bytes per second of ours over those of a copy."""
    if copy not in times:
        return ""
    ours = entry["bytes"] / times["rms_norm"].median
    return f"{ours / (entry['copy_bytes'] / times[copy].median):.0%}"


def speed_table(data: dict[str, Any]) -> list[str]:
    """A line per case: time, bytes per second, shares of copies, ratios to the peers."""
    lines = [
        "| rows × N | dtype | direction | threads | µs (p20 … p80) | GB/s | of clone "
        "| of NT copy | F.layer_norm | F.rms_norm | compiled | best other | pRMSNorm |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for e in entries_of(data, "speed"):
        times = times_of(e)
        t = times["rms_norm"]
        spread = f"{t.median * 1e6:.1f} ({t.p20 * 1e6:.1f} … {t.p80 * 1e6:.1f})"
        cells = [
            f"{e['rows']} × {e['n']}",
            e["dtype"],
            e["direction"],
            str(e["threads"]),
            spread,
            f"{e['bytes'] / t.median / 1e9:.1f}",
            copy_share(e, times, "clone"),
            copy_share(e, times, "nt_copy"),
            *(ratio(times, peer) for peer in PEERS),
            best_other(times),
            ratio(times, "rms_norm", "prms_norm"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def latency_table(data: dict[str, Any]) -> list[str]:
    """Host time of a 1 × 128 call in microseconds."""
    names = ("rms_norm", "prms_norm", "torch_layer_norm", "torch_rms_norm")
    lines = [
        "| 1 × 128 | mode | " + " | ".join(LABELS[n] for n in names) + " |",
        "|---|---|" + "--:|" * len(names),
    ]
    for e in entries_of(data, "latency"):
        times = times_of(e)
        cells = [f"{times[n].median * 1e6:.2f}" for n in names]
        lines.append(f"| {e['kind']} | {e['mode']} | " + " | ".join(cells) + " |")
    return lines


def learning_table(data: dict[str, Any]) -> list[str]:
    """Step time and held-out loss per model and norm."""
    lines = [
        "| model | norm | ms per step (p20 … p80) | LayerNorm / it | held-out loss |",
        "|---|---|--:|--:|--:|",
    ]
    for e in entries_of(data, "learning"):
        times = times_of(e)
        for name, t in times.items():
            spread = f"{t.median * 1e3:.1f} ({t.p20 * 1e3:.1f} … {t.p80 * 1e3:.1f})"
            against = "" if name == "layer_norm" else ratio(times, "layer_norm", name)
            cells = [e["model"], LABELS[name], spread, against, f"{e['held_out'][name]:.3f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def conditions(data: dict[str, Any]) -> str:
    """Hardware and date, in a line."""
    env = data["environment"]
    where = (env["gpu"] or env["cpu"])["model"]
    isa = env["fused_rmsnorm"].get("cpu_capability")
    return f"{where}, {env['threads']} threads, {isa}, torch {env['torch']}, {data['started'][:10]}"


def plot_speed(data: dict[str, Any], path: Path) -> None:
    """Ratio of F.layer_norm's, F.rms_norm's and compiled time to ours, per case."""
    cases = entries_of(data, "speed")
    fig, axis = plt.subplots(figsize=(9, 0.32 * len(cases) + 1.2), layout="constrained")
    for offset, peer in enumerate(PEERS):
        timed = [(i, times) for i, times in enumerate(map(times_of, cases)) if peer in times]
        ratios = [times[peer].median / times["rms_norm"].median for _, times in timed]
        if timed:
            axis.scatter(
                ratios, [i + (offset - 1) * 0.2 for i, _ in timed], s=22, label=LABELS[peer]
            )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    names = [f"{e['rows']}×{e['n']} {e['dtype']} {e['direction']}" for e in cases]
    axis.set_yticks(range(len(cases)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("time of the peer / time of ours (right of the line: ours is faster)")
    axis.set_title(conditions(data), fontsize=9)
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def plot_learning(data: dict[str, Any], path: Path) -> None:
    """Training loss against step and against time, per model."""
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
            by_step.plot(smooth, label=LABELS[name], linewidth=1.2)
            by_time.plot([i * step for i in range(len(smooth))], smooth, linewidth=1.2)
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
        '"=" is inside the noise. The column pRMSNorm: time of our RMSNorm over it. GB/s: minimal '
        "bytes.",
    ]
    if entries_of(data, "speed"):
        parts += speed_table(data)
        plot_speed(data, path.parent / "speed.png")
    if entries_of(data, "latency"):
        parts += ["", "Host time of one call, µs:", "", *latency_table(data)]
    if entries_of(data, "learning"):
        parts += ["", "Character language models on the standard library's sources:", ""]
        parts += learning_table(data)
        plot_learning(data, path.parent / "learning.png")
    parts.insert(1, "")
    text = "\n".join(parts) + "\n"
    (path.parent / f"{path.stem}.md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """``argv``: paths of results files."""
    for path in sys.argv[1:] if argv is None else argv:
        print(write(Path(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
