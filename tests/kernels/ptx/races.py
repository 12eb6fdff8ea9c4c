"""Races: two threads touch the same bytes, one writes, and no barrier orders them."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Threads(NamedTuple):
    """Who accesses, and what each has passed before: arrays with an element per access."""

    who: Array  # the thread, counted over the grid
    barriers: Array  # bar.sync of its CTA
    arrived: Array  # barrier.cluster.arrive
    waited: Array  # barrier.cluster.wait
    cta_threads: int
    cluster_threads: int


class Accesses:
    """The last writer, the last reader and the one before, of every `granule` bytes.

    So a third reader's conflict can escape. An entry packs the thread + 1, the barriers of its CTA
    and those of its cluster that it had arrived at.
    """

    _WHO, _BARRIERS = np.int64(32), np.int64(16)
    _COUNT = np.int64(0xFFFF)

    def __init__(self, size: int, granule: int):
        self.granule = granule
        self.writer, self.reader, self.earlier = (
            np.zeros(size // granule + 1, np.int64) for _ in range(3)
        )

    def forget(self, size: int) -> None:
        """A kernel begins: everything before it is ordered."""
        for record in (self.writer, self.reader, self.earlier):
            record[: size // self.granule + 1] = 0

    def note(
        self, at: Array, size: int, threads: Threads, write: bool
    ) -> tuple[int, int, int] | None:
        """Notes accesses of `size` bytes at byte offsets; returns the first that races: its place,
        its thread and the other thread."""
        steps = np.arange(0, max(size, self.granule), self.granule)
        places = ((at[:, None] + steps) // self.granule).reshape(-1)
        who, barriers, arrived, waited = (
            np.repeat(x.astype(np.int64), len(steps)) for x in threads[:4]
        )
        key = (who + 1) << self._WHO | barriers << self._BARRIERS | arrived

        def unordered(record: Array) -> Array:
            found = record[places]
            they = (found >> self._WHO) - 1
            others: Array = (found != 0) & (they != who)
            if not others.any():
                return others
            cta, cluster = threads.cta_threads, threads.cluster_threads
            before = barriers > (found >> self._BARRIERS & self._COUNT)
            by_cta = (they // cta == who // cta) & before
            by_cluster = (they // cluster == who // cluster) & (waited > (found & self._COUNT))
            return others & ~by_cta & ~by_cluster

        bad, rival = unordered(self.writer), self.writer[places]
        if write:
            for record in (self.reader, self.earlier):
                more = unordered(record) & ~bad
                bad, rival = bad | more, np.where(more, record[places], rival)
            self.writer[places] = key
            both = (self.writer[places] != key) & ~bad  # two threads at once
            bad, rival = bad | both, np.where(both, self.writer[places], rival)
        else:
            before = self.reader[places]
            other = (before >> self._WHO) - 1 != who
            self.earlier[places] = np.where(other, before, self.earlier[places])
            self.reader[places] = key
            lost = self.reader[places] != key
            self.earlier[places[lost]] = key[lost]
        if not bad.any():
            return None
        first = np.flatnonzero(bad)[0]
        rivals = (rival[first] >> self._WHO) - 1
        return int(places[first]) * self.granule, int(who[first]), int(rivals)
