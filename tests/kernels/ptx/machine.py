"""Runs an entry: the threads of several CTAs (whole clusters) in lock step.

Each thread has a place, a basic block. The threads at the smallest place run on together until a
label, a branch or a meeting point. At a meeting point (shuffle, barrier) they stay until everybody
is there who has to be.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counters import Counts
from .isa import Trap
from .memory import VALID, WRITABLE, Global, Space
from .program import BasicBlock, Program
from .spaces import MemoryAccess

Array = NDArray[Any]
# What registers hold before they are written.
_POISON = {1: np.bool_(False), 16: np.uint16(0x7FDE), 32: np.uint32(0x7FDEAD00)}
_POISON |= {64: np.uint64(0x7FFDEAD0DEAD0DEA), 8: np.uint8(0xDE)}


@dataclass(frozen=True)
class Options:
    late: bool = True  # a cp.async takes effect when it is waited for; else at once
    count: bool = False  # sectors and bank conflicts
    races: bool = True  # in shared memory; in global memory where that keeps a record
    together: int = 16384  # threads in lock step
    descending: bool = False  # the threads at the largest place run first


@dataclass(frozen=True)
class Launch:
    kernel: str  # its name in C++
    grid: int  # CTAs
    cta_threads: int
    shared: int  # bytes, dynamic
    cluster: int  # CTAs
    args: tuple[bytes, ...]

    @property
    def cluster_threads(self) -> int:
        return self.cta_threads * self.cluster


def run(program: Program, memory: Global, launch: Launch, options: Options) -> Counts:
    """Raises:
    Trap: what a device would stop at, or answer with garbage.
    """
    counts = Counts()
    if launch.cta_threads % 32 or launch.cta_threads > 1024 or launch.grid % launch.cluster:
        raise Trap(f"no device launches {launch}")
    sizes = [v.size for v in program.entry.params]
    if sizes != [len(a) for a in launch.args]:
        given = [len(a) for a in launch.args]
        raise Trap(f"arguments of {given} bytes for parameters of {sizes}")
    if memory.accesses:
        memory.accesses.forget(memory.end)
    step = max(1, options.together // launch.cluster_threads) * launch.cluster
    with np.errstate(all="ignore"):
        for first in range(0, launch.grid, step):
            ctas = min(step, launch.grid - first)
            Batch(program, memory, launch, options, counts, first, ctas).run()
    program.reached |= set(counts.blocks)
    return counts


def _u4(values: Any) -> Array:
    return np.asarray(values, np.uint32).reshape(-1)


class Batch(MemoryAccess):
    """`ctas` CTAs from `first` on."""

    def __init__(
        self,
        program: Program,
        memory: Global,
        launch: Launch,
        options: Options,
        counts: Counts,
        first: int,
        ctas: int,
    ):
        self.program, self.launch, self.options, self.counts = program, launch, options, counts
        self.first, self.threads = first, ctas * launch.cta_threads
        t = np.arange(self.threads)
        self.lane, self.warp = t % 32, t // 32
        self.cta, self.cluster = t // launch.cta_threads, t // launch.cluster_threads
        self.who = t + first * launch.cta_threads
        self.everyone = np.ones(self.threads, bool)
        self.live = np.ones(self.threads, bool)
        self.place = np.zeros(self.threads, np.int32)
        self.blocked = np.zeros(self.threads, bool)
        self.wrote = np.zeros(self.threads, bool)  # anything, to memory
        self.barriers, self.arrived, self.waited, self.commits = (
            np.zeros(self.threads, np.int32) for _ in range(4)
        )
        self.registers: list[Array] = [np.full(1, _POISON[w]) for w in program.widths]
        self._set_memory(memory, ctas)
        self._set_special()

    def _set_memory(self, memory: Global, ctas: int) -> None:
        program, launch = self.program, self.launch
        self.memory = memory
        self.copies = []
        self.shared_bytes = program.static_shared + launch.shared
        self.stride = -(-self.shared_bytes // 16) * 16  # between CTAs
        size = max(self.stride * ctas, 16)
        self.shared = Space(size, 2 if self.options.races else 0)  # the least that a thread stores
        for n in range(ctas):
            self.shared.state[n * self.stride : n * self.stride + self.shared_bytes] = (
                VALID | WRITABLE
            )
        # Of each CTA: the latest access by another of its cluster, as arrivals of that one.
        self.visited_at = np.full(ctas, -1)
        self.params = np.zeros(-(-program.param_bytes // 16) * 16, np.uint8)
        for v, value in zip(program.entry.params, launch.args, strict=True):
            at = program.symbols[v.name]
            self.params[at : at + v.size] = np.frombuffer(value, np.uint8)

    def _set_special(self) -> None:
        launch, cta = self.launch, self.cta + self.first
        thread = np.arange(self.threads) % launch.cta_threads
        rank = _u4(cta % launch.cluster)
        self.specials = {
            **{"tid.x": _u4(thread), "ntid.x": _u4(launch.cta_threads), "laneid": _u4(self.lane)},
            **{"warpid": _u4(thread // 32), "nwarpid": _u4(launch.cta_threads // 32)},
            **{"ctaid.x": _u4(cta), "nctaid.x": _u4(launch.grid)},
            **{"cluster_ctarank": rank, "cluster_ctaid.x": rank},
            **{"cluster_nctarank": _u4(launch.cluster), "cluster_nctaid.x": _u4(launch.cluster)},
            **{"clusterid.x": _u4(cta // launch.cluster)},
            **{"nclusterid.x": _u4(launch.grid // launch.cluster)},
        }

    # ---------------------------------------------------------------- scheduling
    def run(self) -> None:
        together: int | None = 0  # the place of all live threads; None: each has its own
        while self.live.any():
            at = together if together is not None else self._next_place()
            here = self.live if together is not None else self.live & (self.place == at)
            b = self.program.blocks[at]
            go = here if b.gate is None else here & self._may_go(b, here)
            if (go != here).any():
                if together is not None:
                    self.place[:], together = at, None
                self.blocked |= here
                if not go.any():
                    continue
            self.blocked &= ~go
            everyone = bool(go.all())
            self.counts.blocks[at] += (
                self.threads // 32 if everyone else int(go.reshape(-1, 32).any(1).sum())
            )
            if self.options.count and self.first == 0 and go[0]:
                self.counts.trace.append(at)
            branch = b.run(self, self.registers, None if everyone else go)
            taken = go if branch is None else go & branch
            if b.ends in ("ret", "exit"):
                self._leave(taken, b)
            elif together is not None and (
                b.ends is None or not taken.any() or (taken == go).all()
            ):
                together = b.target if b.ends and taken.any() else at + 1
                continue
            self.place[go] = at + 1
            if b.ends == "bra":
                self.place[taken] = b.target
            places = self.place[self.live]
            same = len(places) and not self.blocked.any() and (places == places[0]).all()
            together = int(places[0]) if same else None

    def _next_place(self) -> int:
        ready = self.place[self.live & ~self.blocked]
        if not len(ready):
            places = Counter(self.place[self.live].tolist())
            gates = {p: self.program.blocks[p].gate for p in sorted(places)}
            said = "; ".join(
                f"{places[p]} at line {g.line}: {g.text}" for p, g in gates.items() if g
            )
            first = self.program.blocks[min(places)].first
            self.trap(f"threads wait for each other: {said}", np.flatnonzero(self.live), first)
        return int(ready.max() if self.options.descending else ready.min())

    def _leave(self, gone: Array, b: BasicBlock) -> None:
        at = b.first + len(b.instructions) - 1
        for copy in self.copies:
            left = copy.threads[gone[copy.threads]]
            if len(left):
                self.trap("threads end while copies of theirs are under way", left, at)
        self.live = self.live & ~gone
        self.blocked[:] = False  # who waited for them may not need to
        for cta in np.unique(self.cta[gone]):
            own = self.cta == cta
            if not self.live[own].any() and self.waited[own].max() <= self.visited_at[cta]:
                what = "a CTA ends that another of its cluster may still be writing to or reading"
                self.trap(what, np.flatnonzero(own), at)

    def _may_go(self, b: BasicBlock, here: Array) -> Array:
        """Of the threads `here`, at a meeting point, those that everybody is there for."""
        gate = b.gate
        assert gate is not None
        if gate.opcode == "shfl":
            return self._may_shuffle(b, here)
        if gate.opcode == "bar" or "cluster" not in gate.modifiers:
            shape = (-1, self.launch.cta_threads)
            there = here.reshape(shape).sum(1) == self.live.reshape(shape).sum(1)
            return there[self.cta]
        if gate.modifiers[1] == "arrive":
            return here
        last = np.iinfo(np.int32).max
        arrived = np.where(self.live, self.arrived, last).reshape(-1, self.launch.cluster_threads)
        return arrived.min(1)[self.cluster] > self.waited

    def _may_shuffle(self, b: BasicBlock, on: Array) -> Array:
        assert b.gate is not None
        masks = self._register(str(b.gate.operands[4]))
        if on.all() and (masks == 0xFFFFFFFF).all():
            return on
        bit = np.uint64(1) << self.lane.astype(np.uint64)

        def ballot(threads: Array) -> Array:
            bits = np.where(threads, bit, np.uint64(0)).reshape(-1, 32)
            return bits.sum(1, dtype=np.uint64)[self.warp]

        there, live = ballot(on), ballot(self.live)
        masks = np.broadcast_to(masks, self.threads).astype(np.uint64)
        outside = on & ((masks & bit) == 0)
        if outside.any():
            what = "a lane shuffles that is not in its own mask"
            self.trap(what, np.flatnonzero(outside), b.first)
        go = on & ((masks & live & ~there) == 0)
        rows, went = masks.reshape(-1, 32), go.reshape(-1, 32)
        if (rows != rows[:, :1]).any():
            lanes = np.arange(32, dtype=np.uint64)
            named = (rows[:, :, None] >> lanes) & np.uint64(1) != 0  # warp, lane, the lane it names
            bad = named & (rows[:, :, None] != rows[:, None, :])
            bad &= went[:, :, None] & went[:, None, :]
            if bad.any():
                threads = np.flatnonzero(bad.any(2).reshape(-1))
                self.trap("lanes that name each other give different masks", threads, b.first)
        return go

    def _register(self, x: str) -> Array:
        if x in self.program.home:
            return self.registers[self.program.home[x]]
        return np.array([int(x.rstrip("U"), 0) & 0xFFFFFFFF], np.uint32)

    def trap(self, what: str, threads: Array, at: int) -> None:
        """Raises Trap, with the instruction at the place `at` and the first of the threads."""
        i, t = self.program.entry.instructions[at], int(np.atleast_1d(threads)[0])
        more = f" and {len(threads) - 1} more" if len(threads) > 1 else ""
        thread = f"CTA {self.cta[t] + self.first}, thread {t % self.launch.cta_threads}{more}"
        raise Trap(f"{what} [{i.text}, line {i.line}; {thread}; {self.program.entry.name}]")

    # ---------------------------------------------------------------- called by instructions
    def special(self, name: str) -> Array:
        if name[-2:] in (".y", ".z"):
            return np.full(1, name[0] == "n" or "_n" in name, np.uint32)
        return self.specials[name]

    def both(self, M: Array | None, guard: Array) -> Array:
        return np.broadcast_to(guard, self.threads) if M is None else M & guard

    def passed_barrier(self, M: Array | None) -> None:
        self.barriers = self.barriers + (1 if M is None else M)

    def cluster_arrive(self, M: Array | None, relaxed: bool = False) -> None:
        on = self.live if M is None else M
        if relaxed and self.wrote[on].any():  # what others could then see late, or not at all
            raise Trap(f"{self.program.entry.name}: a thread that has written arrives relaxed")
        if (self.arrived[on] != self.waited[on]).any():
            name = self.program.entry.name
            raise Trap(f"{name}: arrives at the cluster's barrier twice without a wait")
        self.arrived = self.arrived + on
        self.blocked[:] = False

    def cluster_wait(self, M: Array | None) -> None:
        self.waited = self.waited + (1 if M is None else M)

    def map_shared(self, address: Array, rank: Array) -> Array:
        """mapa: the same place in another CTA's memory. Bits 24 and up hold its rank + 1."""
        kind = address.dtype.type
        own = (address & kind(0xFFFFFF)) | (address & ~kind(0xFFFFFFFF))
        mapped: Array = own | (rank.astype(address.dtype) + kind(1)) << kind(24)
        return mapped

    def shuffle(
        self, mode: str, a: Array, b: Array, c: Array, masks: Array, M: Array | None, at: int
    ) -> tuple[Array, Array]:
        """shfl.sync: the values, and whether the source lane was inside the segment."""

        def wide(x: Array) -> Array:
            return np.broadcast_to(x, self.threads).astype(np.int64)

        lane = self.lane.astype(np.int64)
        by, clamp, segment = wide(b) & 31, wide(c) & 31, wide(c) >> 8 & 31
        low, high = lane & segment, (lane & segment) | (clamp & ~segment)
        if mode == "up":
            j = lane - by
        elif mode == "down":
            j = lane + by
        elif mode == "bfly":
            j = lane ^ by
        else:
            j = low | (by & ~segment)
        inside = j >= high if mode == "up" else j <= high
        j = np.where(inside, j, lane)
        source = self.warp * 32 + j
        on = self.everyone if M is None else M
        bad = on & (~on[source] | ((wide(masks) >> j & 1) == 0))
        if bad.any():
            self.trap("reads from a lane that takes no part", np.flatnonzero(bad), at)
        return np.broadcast_to(a, self.threads)[source], inside
