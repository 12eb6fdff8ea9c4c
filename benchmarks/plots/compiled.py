"""The model of the compiled CUDA code: curves over N. Nothing in these was measured on a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..harness.results import RESULTS
from .style import INK, Source, figure, finish

__all__ = ["PLOTS"]

GPUS = {
    "A100": ("#8a8f98", "o"),
    "H100": ("#3f9c57", "s"),
    "H200": ("#1f9eb0", "^"),
    "RTX PRO 6000": ("#b98a2f", "v"),
    "B200": ("#b5569e", "D"),
}
RESOURCES = {
    "issue": ("instructions", "#d1632f", "o"),
    "L2": ("L2", "#3d8fd1", "s"),
    "L1": ("L1 and shared memory", "#2a9d6f", "^"),
    "latency": ("latency", "#8f6be0", "v"),
}
NOTE = "A model from counts of the compiled code, not a measurement: nothing here has run on a GPU."


def over_n(found: dict[str, Any], direction: str, dtype: str) -> list[tuple[int, dict[str, Any]]]:
    """(N, model) of the plain kernels of aligned rows, in the order of N."""
    plain = re.compile(rf"{direction} (\d+) {dtype}$")
    cases = ((plain.match(name), entry) for name, entry in found.items())
    return sorted(
        ((int(m[1]), entry) for m, entry in cases if m and int(m[1]) % 8 == 0),
        key=lambda case: case[0],
    )


def on_n_axis(axis: Any) -> None:
    axis.set_xscale("log", base=2)
    ticks = [64, 256, 1024, 4096, 16384, 65536, 262144]
    axis.set_xticks(ticks, [f"{n >> 10}k" if n >= 1024 else str(n) for n in ticks])
    axis.set_xlabel("N")


def share(path: Path) -> None:
    """The share of a copy's speed that the code allows, against N."""
    source = Source(RESULTS / "compiled" / "counts.json")
    fig, axes = figure(1, 2, (9.5, 3.8), sharey=True)
    for axis, direction in zip(axes[0], ("forward", "backward"), strict=True):
        for gpu, (colour, marker) in GPUS.items():
            if gpu not in source.data["models"]:
                continue
            cases = over_n(source.data["models"][gpu], direction, "bf16")
            values = [100 * found["share of memory"] for _, found in cases]
            axis.plot([n for n, _ in cases], values, color=colour, marker=marker, label=gpu)
        axis.axhline(100, color=INK, linewidth=1, linestyle="--")
        axis.set_title(f"{direction}, bf16")
        axis.set_ylim(0, 106)
        on_n_axis(axis)
    axes[0][0].set_ylabel("% of a copy's speed\nthat the code allows")
    finish(fig, path, [source], NOTE, columns=5)


def resources(path: Path) -> None:
    """What else takes time on an H100, as a share of the time of memory."""
    source = Source(RESULTS / "compiled" / "counts.json")
    fig, axes = figure(1, 2, (9.5, 3.8), sharey=True)
    for axis, direction in zip(axes[0], ("forward", "backward"), strict=True):
        cases = over_n(source.data["models"]["H100"], direction, "bf16")
        for resource, (label, colour, marker) in RESOURCES.items():
            values = [100 * e["ns"][resource] / e["ns"]["memory"] for _, e in cases]
            axis.plot([n for n, _ in cases], values, color=colour, marker=marker, label=label)
        axis.axhline(100, color=INK, linewidth=1, linestyle="--", label="memory")
        axis.set_title(f"H100, {direction}, bf16")
        axis.set_ylim(bottom=0)
        on_n_axis(axis)
    axes[0][0].set_ylabel("% of memory's time")
    finish(fig, path, [source], f"Below the dashed line memory is the limit. {NOTE}", columns=5)


PLOTS = {"compiled-share": share, "compiled-resources": resources}
