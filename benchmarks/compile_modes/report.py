"""The table of ``python -m benchmarks.compile_modes``, from its results file:
``python -m benchmarks.compile_modes.report RESULTS/compile_modes.json``. Nothing is measured here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..harness.results import load
from ..harness.tables import conditions, entries_of, ratio, spread, table, times_of, write_each

# In the order of the columns: name in the results -> heading.
COMPILED = {
    "rms_norm_opaque": "ours, opaque",
    "rms_norm_fuse": "ours, fuse",
    "rms_norm_eager": "ours, eager",
    "add_rms_norm_opaque": "AddRMSNorm, opaque",
    "add_rms_norm_fuse": "AddRMSNorm, fuse",
    "add_rms_norm_eager": "AddRMSNorm, eager",
    "torch_rms_norm_compiled": "nn.RMSNorm, compiled",
    "torch_rms_norm_eager": "nn.RMSNorm, eager",
    "torch_layer_norm_compiled": "nn.LayerNorm, compiled",
    "torch_layer_norm_eager": "nn.LayerNorm, eager",
}


def compile_table(data: dict[str, Any]) -> list[str]:
    """Time of ours with its fused operator kept by the compiler, and the others' over it."""
    rows = []
    for e in entries_of(data, "compile"):
        times = times_of(e)
        base = next(name for name in COMPILED if name in times)
        ratios = (ratio(times, name, base) if name != base else "1" for name in COMPILED)
        rows.append(
            [e["context"], e["dtype"], e["direction"], spread(times[base], 1e3, digits=3), *ratios]
        )
    header = ["context", "dtype", "direction", "ms of that with 1 (p20 … p80)", *COMPILED.values()]
    return table(header, rows, 3)


def write(path: Path) -> str:
    """Writes compile_modes.md beside the JSON file ``path``; returns the Markdown."""
    data = load(path)
    lines = [
        f"{conditions(data)}. Ratios: time of the peer over time of ours, above 1 ours is faster; "
        '"=" is inside the noise.',
        "",
        "Under torch.compile: ours with its fused operator kept (opaque) or handed over as plain "
        "operations (fuse). Columns: time over that of the column with 1.",
        "",
        *compile_table(data),
    ]
    text = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(text)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """``argv``: paths of results files."""
    return write_each(write, argv)


if __name__ == "__main__":
    sys.exit(main())
