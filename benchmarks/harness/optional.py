"""What a benchmark can go without: tqdm's progress bar and matplotlib's plots."""

from __future__ import annotations

import importlib
import sys
from types import TracebackType
from typing import Any

__all__ = ["progress_bar", "pyplot"]


class _Lines:
    """What of tqdm is used here: one line per description."""

    def __init__(self, total: float) -> None:
        self.total, self.n = total, 0.0

    def set_description(self, text: str) -> None:
        print(f"{self.n / self.total:4.0%} {text}" if self.total else text, flush=True)

    def update(self, by: float = 1) -> None:
        self.n += by

    def __enter__(self) -> _Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


def progress_bar(total: float) -> Any:
    """A context with ``set_description(text)``, ``update(by)`` and ``n``, what is done."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _Lines(total)
    return tqdm(total=total, unit="", bar_format="{l_bar}{bar}| {elapsed}<{remaining}")


def pyplot() -> Any:
    """matplotlib.pyplot without a screen; None, and a line that says so, where it is missing."""
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ModuleNotFoundError:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return None
    return importlib.import_module("matplotlib.pyplot")
