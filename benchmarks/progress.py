"""A progress bar: tqdm's, or lines of text where tqdm is missing."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["progress_bar"]


class _Lines:
    """What of tqdm is used here: one line per description."""

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0.0

    def set_description(self, text: str) -> None:
        print(f"{self.done / self.total:4.0%} {text}" if self.total else text, flush=True)

    def update(self, by: float = 1) -> None:
        self.done += by

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
    """A context with ``set_description(text)`` and ``update(by)``."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _Lines(total)
    return tqdm(total=total, unit="", bar_format="{l_bar}{bar}| {elapsed}<{remaining}")
