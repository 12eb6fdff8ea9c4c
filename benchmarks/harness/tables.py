"""What the reports share: Markdown tables, their cells, and the command line.

A ratio inside the noise is "=" in a table; a column that no row fills, such as that of a peer that
was not run, is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .timing import Timing, speedup

__all__ = [
    "conditions",
    "entries_of",
    "ratio",
    "spread",
    "table",
    "times_of",
    "write_each",
]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> list[str]:
    """Lines of Markdown, the first ``texts`` columns to the left; empty columns are left out."""
    shown = [i for i in range(len(header)) if any(row[i] for row in rows)]
    lines = [header, ["---" if i < texts else "--:" for i in range(len(header))], *rows]
    return ["| " + " | ".join(line[i] for i in shown) + " |" for line in lines]


def spread(t: Timing, unit: float, digits: int = 1) -> str:
    """Median and p20 … p80 in a unit that is 1 / ``unit`` seconds: 1e3 gives ms."""
    median, p20, p80 = (f"{v * unit:.{digits}f}" for v in (t.median, t.p20, t.p80))
    return f"{median} ({p20} … {p80})"


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


def conditions(data: dict[str, Any]) -> str:
    """Hardware and date, in a line."""
    env = data["environment"]
    where = (env["gpu"] or env["cpu"])["model"]
    isa = env["fused_rmsnorm"].get("cpu_capability")
    return f"{where}, {env['threads']} threads, {isa}, torch {env['torch']}, {data['started'][:10]}"


def write_each(write: Callable[[Path], str], argv: Sequence[str] | None) -> int:
    """The command line of a report: writes and prints that of each results file in ``argv``.

    Args:
        write: writes the report beside the JSON file that it is given, and returns its Markdown.
        argv: paths of results files; None: the arguments of the process.
    """
    for path in sys.argv[1:] if argv is None else argv:
        print(write(Path(path)))
    return 0
