"""State spaces as bytes that each know whether they may be touched, have been written, and how."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .isa import GLOBAL_BASE, Trap
from .races import Accesses

# States of a byte. COMING: a cp.async to it is under way.
VALID, INIT, WRITABLE, COMING = 1, 2, 4, 8
RED_ZONE = 512  # bytes round each array that belong to none
UINT: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
Array = NDArray[Any]


def _repeated(state: int, bytes_: int) -> Any:
    return UINT[bytes_](int.from_bytes(bytes([state] * bytes_), "little"))


class Space:
    """`granule` bytes share an entry in the record of accesses; 0: none is kept."""

    def __init__(self, size: int, granule: int):
        self.size = -(-size // 16) * 16
        self.data, self.state = np.zeros(self.size, np.uint8), np.zeros(self.size, np.uint8)
        self.views: dict[int, Array] = {s: self.data.view(t) for s, t in UINT.items()}
        self.states: dict[int, Array] = {s: self.state.view(t) for s, t in UINT.items()}
        self.accesses = Accesses(self.size, granule) if granule else None

    def allowed(self, at: Array, size: int, need: int) -> Array:
        """Of byte offsets (aligned to `size`): whether all bytes have the state `need` and none is
        coming."""
        unit = min(size, 8)
        ask, want = _repeated(need | COMING, unit), _repeated(need, unit)
        states = self.states[unit]
        good: Array = (states[at // unit] & ask) == want
        return good if size <= 8 else good & ((states[at // 8 + 1] & ask) == want)

    def gather(self, at: Array, unit: int, count: int) -> list[Array]:
        if count == 1:
            return [self.views[unit][at // unit]]
        found = self.views[unit].reshape(-1, count)[at // (unit * count)]
        return [np.ascontiguousarray(found[:, n]) for n in range(count)]

    def scatter(self, at: Array, unit: int, values: Sequence[Array]) -> None:
        for n, v in enumerate(values):
            self.views[unit][at // unit + n] = v

    def mark(self, at: Array, size: int, bits: int, clear: int = 0) -> None:
        unit = min(size, 8)
        on, off = _repeated(bits, unit), _repeated(clear, unit)
        for n in range(size // unit):
            place = at // unit + n
            self.states[unit][place] = self.states[unit][place] & ~off | on


class Global(Space):
    """The device's memory: arrays with red zones round each."""

    def __init__(self, size: int, races: bool = False):
        super().__init__(size, 2 if races else 0)
        self.end = RED_ZONE
        self.arrays: list[tuple[str, int, int]] = []  # name, offset, bytes

    def new(
        self,
        size: int,
        name: str,
        shift: int = 0,
        content: Array | None = None,
        writable: bool = False,
    ) -> int:
        """The address of `size` bytes, `shift` bytes past a multiple of 256; unwritten without
        content."""
        at = -(-self.end // 256) * 256 + shift
        self.end = at + size + RED_ZONE
        if self.end > self.size:
            raise MemoryError(f"{name} of {size} bytes: the device's memory has {self.size}")
        self.arrays.append((name, at, size))
        self.state[at : at + size] = (
            VALID | (WRITABLE if writable else 0) | (INIT if content is not None else 0)
        )
        self.data[at : at + size] = 0xFD
        if content is not None:
            self.data[at : at + size] = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
        return GLOBAL_BASE + at

    def read(self, address: int, size: int, dtype: Any) -> Array:
        """What the host copies back.

        Raises:
            Trap: bytes that no kernel has written.
        """
        at = address - GLOBAL_BASE
        unwritten = np.flatnonzero((self.state[at : at + size] & INIT) == 0)
        if len(unwritten):
            more = f", nor {len(unwritten) - 1} more bytes" if len(unwritten) > 1 else ""
            raise Trap(f"{self.describe(at + int(unwritten[0]))}: never written{more}")
        return self.data[at : at + size].copy().view(dtype)

    def _nearest(self, at: int) -> tuple[str, int, int]:
        return min(self.arrays, key=lambda a: max(a[1] - at, at - a[1] - a[2] + 1, 0))

    def array(self, at: int) -> str:
        """The name of the array that holds the byte."""
        return self._nearest(at)[0]

    def describe(self, at: int) -> str:
        if not self.arrays:
            return "no array at all"
        name, start, size = self._nearest(at)
        return f"{name} of {size} bytes, at {at - start}"
