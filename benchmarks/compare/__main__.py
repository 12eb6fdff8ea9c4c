"""Two results files against each other: ``python -m benchmarks.compare OLD NEW``.

Entries are matched by key and contender. Speeds of two days, let alone of two machines, do not
compare; ratios within a run do. So each of our contenders is judged by its time over that of a
reference that was measured in the same run: its change from OLD to NEW is a regression if it is
above both the noise of the two ratios together and ``--threshold``. Where both runs have the same
hardware, torch and threads, absolute times are judged the same way and shown; they count with
``--absolute`` only, for a neighbour on the machine slows everything down, or where no reference is
in both files. Bytes of memory are exact: any growth is a regression.

Exit status: 0, 1 if there are regressions, 2 if the files cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..harness.results import load
from ..harness.timing import UNKNOWN, Timing

__all__ = ["REFERENCES", "Change", "Comparison", "compare", "differences", "main"]

# The first that an entry has in both files, unless --reference names one.
REFERENCES = ("torch_layer_norm", "layer_norm", "torch_layer_norm_eager", "clone", "torch_rms_norm")
OURS = ("rms_norm", "prms_norm", "add_rms_norm")  # how names of our contenders begin


@dataclass(frozen=True)
class Change:
    """Of a time or of a ratio of times. ``factor``: new over old; ``noise``: of it, relative."""

    old: float
    new: float
    noise: float

    @property
    def factor(self) -> float:
        return self.new / self.old

    def verdict(self, threshold: float) -> str:
        """One of "slower", "faster" and "=": inside the noise, or not above 1 + ``threshold``."""
        change = math.log(self.factor)
        if abs(change) <= max(self.noise, math.log1p(threshold)):
            return "="
        return "slower" if change > 0 else "faster"


@dataclass(frozen=True)
class Row:
    """One contender of one entry that both files have."""

    key: str
    contender: str
    reference: str | None
    ratio: Change | None  # over the reference
    absolute: Change | None  # where the environments match


@dataclass(frozen=True)
class Comparison:
    rows: list[Row]
    grown: list[str]  # entries of memory that take more bytes, a line each
    missing: list[str]  # what one of the files lacks, a line each
    warnings: list[str]

    def slower(self, threshold: float, absolute: bool) -> list[Row]:
        """The regressions; ``absolute``: of absolute times, too."""
        return [row for row in self.rows if _is_slower(row, threshold, absolute)]


def _is_slower(row: Row, threshold: float, absolute: bool) -> bool:
    judged = [row.ratio, row.absolute if absolute or row.ratio is None else None]
    return any(change and change.verdict(threshold) == "slower" for change in judged)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two environments that times depend on, a line each."""

    def facts(env: dict[str, Any]) -> dict[str, Any]:
        cpu, gpu = env["cpu"], env["gpu"] or {}
        return {
            "CPU": cpu["model"],
            "cores": cpu["cores"],
            "caches": cpu["caches"],
            "instruction set of torch": cpu["aten_capability"],
            "instruction set of ours": env["fused_rmsnorm"].get("cpu_capability"),
            "GPU": gpu.get("model"),
            "CUDA": gpu.get("cuda_of_torch"),
            "driver": gpu.get("driver_version"),
            "torch": env["torch"],
            "threads": env["threads"],
            "allocator": env["allocator"],
        }

    before, after = facts(old), facts(new)
    return [f"{k}: {before[k]} -> {after[k]}" for k in before if before[k] != after[k]]


def _timings(entry: dict[str, Any]) -> dict[str, Timing]:
    return {name: Timing.from_json(t) for name, t in entry.get("times", {}).items()}


def _rows(
    key: str, old: dict[str, Timing], new: dict[str, Timing], reference: str | None, same: bool
) -> Iterator[Row]:
    common = [name for name in (reference,) if name] or REFERENCES
    base = next((name for name in common if name in old and name in new), None)
    for name in old:
        if name not in new or name == base or not name.startswith(OURS):
            continue
        noise = math.hypot(old[name].noise, new[name].noise)
        absolute = Change(old[name].median, new[name].median, noise) if same else None
        ratio = None
        if base:
            # The noise of a ratio is the larger of two, as in timing.speedup; the runs' add up.
            noises = (max(run[name].noise, run[base].noise) for run in (old, new))
            before, after = (run[name].median / run[base].median for run in (old, new))
            ratio = Change(before, after, math.hypot(*noises))
        yield Row(key, name, base, ratio, absolute)


def _grown(key: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for what in ("saved", "peak"):
        before, after = old.get(what, {}), new.get(what, {})
        for name in before:
            if name in after and name.startswith(OURS) and after[name] > before[name]:
                yield f"{key} {name}: {what} bytes {before[name]} -> {after[name]}"


def _missing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Name, and which of the files lacks it."""
    for here, there, side in ((old, new, "NEW"), (new, old, "OLD")):
        yield from ((name, side) for name in here if name not in there)


def compare(
    old: dict[str, Any], new: dict[str, Any], *, reference: str | None = None
) -> Comparison:
    """Two loaded results files of one kind.

    Args:
        reference: contender that the others' times are taken over; None: see ``REFERENCES``.

    Raises:
        ValueError: the files are of different kinds, or have no entry in common.
    """
    if old["kind"] != new["kind"]:
        raise ValueError(f"OLD is of kind {old['kind']!r}, NEW of kind {new['kind']!r}")
    before, after = old["entries"], new["entries"]
    both = [key for key in before if key in after]
    if not both:
        raise ValueError("the files have no entry in common")
    differ = differences(old["environment"], new["environment"])
    rows: list[Row] = []
    grown: list[str] = []
    missing = [f"{key}: not in {side}" for key, side in _missing(before, after)]
    contenders: Counter[tuple[str, str]] = Counter()
    for key in both:
        times = _timings(before[key]), _timings(after[key])
        rows += _rows(key, *times, reference, not differ)
        grown += _grown(key, before[key], after[key])
        for what in ("times", "saved", "peak"):
            contenders.update(_missing(*(e[key].get(what, {}) for e in (before, after))))
    missing += [
        f"contender {name}: not in {side}, in {count} of the entries that both files have"
        for (name, side), count in contenders.items()
    ]
    warnings = [f"environments differ, {line}" for line in differ]
    for name, data in (("OLD", old), ("NEW", new)):
        if not data["complete"]:
            warnings.append(f"{name} is of a run that was stopped")
    if reference and not any(row.reference for row in rows):
        warnings.append(f"no entry has the reference {reference!r} in both files")
    return Comparison(rows, grown, missing, warnings)


def _columns(lines: Sequence[Sequence[str]], texts: int) -> str:
    """Aligned: the first ``texts`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < texts else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cells(change: Change | None, threshold: float) -> list[str]:
    if change is None:
        return ["", "", ""]
    noise = "unknown" if change.noise >= UNKNOWN else f"±{math.expm1(change.noise):.1%}"
    return [f"{change.factor - 1:+.1%}", noise, change.verdict(threshold)]


def show(comparison: Comparison, threshold: float, absolute: bool, every: bool) -> str:
    """The comparison as text; ``every``: rows that did not change, too."""
    slower = comparison.slower(threshold, absolute)
    lines = [["entry", "contender", "over", "change", "noise", "", "absolute", "noise", ""]]
    quiet = 0
    for row in comparison.rows:
        cells = [*_cells(row.ratio, threshold), *_cells(row.absolute, threshold)]
        if not every and not {cells[2], cells[5]} & {"slower", "faster"}:
            quiet += 1
            continue
        mark = "  <- REGRESSION" if row in slower else ""
        cells[5] += mark
        lines.append([row.key, row.contender, row.reference or "", *cells])
    parts = [f"warning: {line}" for line in comparison.warnings]
    if len(lines) > 1:
        title = "Time, or time over the reference's, NEW against OLD: + is slower."
        parts += ["", title, "", _columns(lines, 3), ""]
    if quiet:
        parts += [f"{quiet} not changed by more than noise and threshold ({threshold:.0%})"]
    parts += [f"missing: {line}" for line in comparison.missing]
    parts += [f"REGRESSION: {line}" for line in comparison.grown]
    count = len(slower) + len(comparison.grown)
    compared = f"{len(comparison.rows)} contenders compared"
    parts.append(f"{compared}, {count} regression{'s' * (count != 1)}")
    return "\n".join(parts).strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: see the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("old", metavar="OLD", help="results file, e.g. norms.json")
    add("new", metavar="NEW")
    add("--reference", help=f"default: the first in both files of {', '.join(REFERENCES)}")
    add("--threshold", type=float, default=0.05, help="changes up to this do not count (0.05)")
    add("--absolute", action="store_true", help="slower absolute times are regressions, too")
    add("--all", action="store_true", help="show what did not change, too")
    args = parser.parse_args(argv)
    try:
        comparison = compare(load(args.old), load(args.new), reference=args.reference)
    except (OSError, ValueError) as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    print(show(comparison, args.threshold, args.absolute, args.all))
    return 1 if comparison.grown or comparison.slower(args.threshold, args.absolute) else 0


if __name__ == "__main__":
    sys.exit(main())
