"""What the commands of this folder share: options, the results file, its report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..harness.environment import environment, hardware_slug, keep_freed_memory
from ..harness.results import RESULTS, Results

__all__ = ["DIRECTIONS", "Entries", "options", "run"]

DIRECTIONS = ("forward", "forward+backward")

# Key -> what measures that entry, in the order of the report; of a device.
Entries = Callable[[torch.device], Iterator[tuple[str, Callable[[], dict[str, Any]]]]]


def options(prog: str, about: str | None, seconds: float) -> argparse.ArgumentParser:
    """A parser with --dtypes, --seconds and --out."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=about)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, default=seconds, help="per row, all together")
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser


def run(
    name: str,
    args: argparse.Namespace,
    kept: dict[str, Any],
    entries: Entries,
    markdown: Callable[[dict[str, Any]], str],
) -> int:
    """Measures into NAME.json, with the options ``kept``, and reports in NAME.md. Exit status: 0
    done, 130 stopped."""
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = args.out or RESULTS / hardware_slug(environment())
    results = Results(folder / f"{name}.json", name, kept)

    def work() -> None:
        for key, make in entries(device):
            results.run(f"{name}/{key}", make)

    def write(path: Path) -> str:
        text = markdown(results.data)
        path.with_suffix(".md").write_text(text)
        return text

    return results.complete(work, write)
