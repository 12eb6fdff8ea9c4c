"""What all plots share: a colour for each contender, the look of axes, how a plot is saved."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..harness.optional import pyplot
from ..harness.results import RESULTS

__all__ = [
    "COLOURS",
    "CONTENDERS",
    "INK",
    "MACHINE",
    "Look",
    "NotMeasured",
    "Source",
    "figure",
    "finish",
]

MACHINE = RESULTS / "intel-xeon-2-cores-avx512"
INK = "#7d8794"  # of text and axes: about the same contrast on white and on black


class Look(NamedTuple):
    label: str
    colour: str
    marker: str = "o"


# The same everywhere: warm colours are ours, cold ones the others'.
CONTENDERS = {
    "rms_norm": Look("RMSNorm (ours)", "#e4572e"),
    "add_rms_norm": Look("add + RMSNorm in one (ours)", "#c2477f"),
    "prms_norm": Look("pRMSNorm 6.25 % (ours)", "#e6a122", "D"),
    "fuse": Look("RMSNorm (ours), as plain operations", "#e6a122", "D"),
    "torch_layer_norm": Look("F.layer_norm", "#3d8fd1", "s"),
    "torch_rms_norm": Look("F.rms_norm", "#8f6be0", "^"),
    "compiled_rms_norm": Look("F.rms_norm, compiled", "#2a9d6f", "v"),
    "composed": Look("LayerNorm of elementary operations", "#a9744f", "P"),
    "none": Look("no norm at all", INK, "x"),
}
# The same norms under the names that other results have for them, and larger fractions of pRMSNorm.
COLOURS = {
    **{name: look.colour for name, look in CONTENDERS.items()},
    "layer_norm": CONTENDERS["torch_layer_norm"].colour,
    "layer_norm_composed": CONTENDERS["composed"].colour,
    "prms_norm_12.5": "#c9a227",
    "prms_norm_25": "#a3a13a",
    "prms_norm_50": "#7f9a4e",
}


class NotMeasured(Exception):
    """The results do not have what a plot shows."""


class Source:
    """A results file, and what of it a plot says that it was drawn from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text()
        self.data: dict[str, Any] = json.loads(self.text)

    @property
    def stamp(self) -> str:
        """Name and digest: a test compares it with the file, so that no plot stays behind."""
        inside = self.path.is_relative_to(RESULTS)
        name = self.path.relative_to(RESULTS).as_posix() if inside else self.path.name
        return f"{name} {hashlib.sha256(self.text.encode()).hexdigest()[:16]}"


def figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> Any:
    """(figure, axes as an array of rows), in the look of all plots."""
    plt = pyplot()
    if plt is None:
        raise SystemExit("plots need matplotlib")
    plt.rcParams.update(
        {
            "svg.hashsalt": "fused-rmsnorm",  # the same file every time
            "svg.fonttype": "path",
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.9,
            "lines.markersize": 5,
            "legend.frameon": False,
            "legend.fontsize": 9.5,
            **dict.fromkeys(
                ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor"), INK
            ),
            **dict.fromkeys(("xtick.color", "ytick.color"), INK),
        }
    )
    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def finish(
    fig: Any, path: Path, sources: Sequence[Source], note: str = "", *, columns: int = 4
) -> None:
    """One legend above, the note below, and the file."""
    found: dict[str, Any] = {}
    for axis in fig.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        fig.legend(
            list(found.values()), list(found), loc="outside upper center", ncols=columns,
            columnspacing=1.4, handletextpad=0.5,
        )  # fmt: skip
    if note:
        width = int(fig.get_size_inches()[0] * 14.5)
        fig.supxlabel("\n".join(textwrap.wrap(note, width)), fontsize=8.5, color=INK)
    stamps = "; ".join(source.stamp for source in sources)
    fig.savefig(
        path, transparent=True,
        metadata={"Description": f"drawn from {stamps}", "Date": None, "Creator": None},
    )  # fmt: skip
    pyplot().close(fig)
