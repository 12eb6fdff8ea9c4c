"""What a launch has done, counted per warp: instructions by class, 32-byte sectors of global
memory, wavefronts of shared memory."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SECTOR = 32


def distinct(values: Array, active: Array) -> Array:
    """How many different values each row of `values` has where active."""
    last = np.iinfo(values.dtype).max
    s = np.sort(np.where(active, values, last), axis=1)
    return (s[:, 1:] != s[:, :-1]).sum(1) + 1 - (~active).any(1)


def wavefronts(words: Array, active: Array, size: int) -> tuple[int, int]:
    """(taken, least) cycles of shared memory for an access of `size` bytes by rows of 32 lanes
    that begin at these 4-byte words: 8 and 16 bytes go by half and quarter warps; different words
    of a bank one by one."""
    per = max(size // 4, 1)
    lanes = 32 // per
    w = (words.reshape(-1, lanes, 1) + np.arange(per)).reshape(-1, lanes * per)
    on = np.repeat(active.reshape(-1, lanes), per, axis=1)
    w, on = w[on.any(1)], on[on.any(1)]
    none = np.int64(1) << 60
    key = np.sort(np.where(on, w % 32 << 40 | w, none), axis=1)
    fresh = np.concatenate([np.ones((len(key), 1), bool), key[:, 1:] != key[:, :-1]], axis=1)
    fresh &= key < none
    row = np.broadcast_to(np.arange(len(key))[:, None], key.shape)[fresh]
    degree = np.bincount(row * 32 + (key[fresh] >> 40), minlength=len(key) * 32).reshape(-1, 32)
    return int(degree.max(1).sum()), int(np.maximum(1, -(-degree.sum(1) // 32)).sum())


@dataclass
class Counts:
    """Of one kernel's launches. `memory` keys: (access, what); access: ld.global, st.global,
    ld.shared, st.shared, cp.async (reads of global memory), cp.async.shared (its writes)."""

    blocks: "Counter[int]" = field(default_factory=Counter)  # warps that ran each basic block
    memory: "Counter[tuple[str, str]]" = field(default_factory=Counter)
    touched: dict[str, set[int]] = field(default_factory=lambda: {"read": set(), "written": set()})
    trace: list[int] = field(default_factory=list)  # basic blocks, as the first thread ran them
    arrays: dict[int, str] = field(default_factory=dict)  # what an instruction reads or writes

    def note(self, access: str, lanes_at: Array, lanes_on: Array, size: int) -> None:
        """An access of `size` bytes at byte offsets: rows of 32 lanes, and which take part."""
        c = self.memory
        c[access, "requests"] += int(lanes_on.any(1).sum())
        c[access, "bytes"] += int(lanes_on.sum()) * size
        if "shared" in access:
            taken, least = wavefronts(lanes_at // 4, lanes_on, size)
            c[access, "wavefronts"] += taken
            c[access, "least wavefronts"] += least
        else:
            c[access, "sectors"] += int(distinct(lanes_at // SECTOR, lanes_on).sum())
            least_bytes = distinct(lanes_at, lanes_on) * size
            c[access, "least sectors"] += int((-(-least_bytes // SECTOR)).sum())
            sectors = np.unique(lanes_at[lanes_on] // SECTOR).tolist()
            self.touched["written" if access.startswith("st") else "read"].update(sectors)
