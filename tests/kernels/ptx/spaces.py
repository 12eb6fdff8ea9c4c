"""Loads, stores and asynchronous copies of the threads that run together, each checked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .isa import GLOBAL_BASE, SHARED_BASE, SHARED_WINDOW
from .memory import COMING, INIT, VALID, WRITABLE, Global, Space
from .races import Threads

if TYPE_CHECKING:
    from .counters import Counts
    from .machine import Launch, Options

Array = NDArray[Any]


@dataclass
class Copy:
    """cp.async under way: an element per thread."""

    threads: Array
    to: Array
    source: Array
    size: int
    group: Array  # how many groups its thread had committed before
    at: int  # the instruction

    def part(self, which: Array) -> "Copy":
        return Copy(
            self.threads[which],
            self.to[which],
            self.source[which],
            self.size,
            self.group[which],
            self.at,
        )


class MemoryAccess:
    """What machine.Batch does with memory; that class says what the attributes hold."""

    memory: Global
    shared: Space
    params: Array
    copies: list[Copy]
    threads: int
    stride: int
    shared_bytes: int
    launch: "Launch"
    options: "Options"
    counts: "Counts"
    who: Array
    cta: Array
    live: Array
    wrote: Array
    everyone: Array
    barriers: Array
    arrived: Array
    waited: Array
    commits: Array
    visited_at: Array

    def trap(self, what: str, threads: Array, at: int) -> None:
        raise NotImplementedError

    # ---------------------------------------------------------------- called by instructions
    def load_param(
        self, address: Array, size: int, count: int, M: Array | None, instruction: int
    ) -> list[Array]:
        words = self.params.view(f"u{size}")
        threads, here = self._active(address, M)
        if (here >= np.uint64(size * (len(words) - count + 1))).any():
            self.trap("outside of the parameters", threads, instruction)
        if np.size(address) == 1:
            return [words[address.astype(np.int64) // size + n] for n in range(count)]
        at = np.zeros(self.threads, np.int64)  # in the other threads the register may hold anything
        at[threads] = here.astype(np.int64) // size
        return [words[at + n] for n in range(count)]

    def load(
        self, space: str, address: Array, unit: int, count: int, M: Array | None, at: int
    ) -> list[Array]:
        """`count` times `unit` bytes; `at`: the instruction."""
        threads, here = self._active(address, M)
        if not len(threads):
            return [np.zeros(1, f"u{unit}")] * count
        size = unit * count
        memory, where = self._resolve(space, here, size, at, threads)
        self._check(memory, where, size, VALID | INIT, threads, at)
        self._count("ld", memory, where, size, threads, at)
        found = memory.gather(where, unit, count)
        if M is None:
            return found
        out = [np.zeros(self.threads, f.dtype) for f in found]
        for o, f in zip(out, found, strict=True):
            o[threads] = f
        return out

    def store(
        self,
        space: str,
        address: Array,
        values: tuple[Array, ...],
        unit: int,
        M: Array | None,
        at: int,
    ) -> None:
        threads, here = self._active(address, M)
        if not len(threads):
            return
        size = unit * len(values)
        memory, where = self._resolve(space, here, size, at, threads)
        self._check(memory, where, size, VALID | WRITABLE, threads, at)
        self._count("st", memory, where, size, threads, at)
        self.wrote[threads] = True
        memory.scatter(where, unit, [np.broadcast_to(v, self.threads)[threads] for v in values])
        memory.mark(where, size, INIT)

    def copy(self, to: Array, source: Array, size: int, M: Array | None, at: int) -> None:
        """cp.async."""
        threads, to = self._active(to, M)
        if not len(threads):
            return
        shared, to = self._resolve("shared", to, size, at, threads)
        _, source = self._resolve("global", self._active(source, M)[1], size, at, threads)
        self._check(self.memory, source, size, VALID | INIT, threads, at)
        self._check(shared, to, size, VALID | WRITABLE, threads, at)
        self._count("cp.async", self.memory, source, size, threads, at)
        self._count("cp.async", shared, to, size, threads, at)
        self.wrote[threads] = True
        shared.mark(to, size, COMING)
        copy = Copy(threads, to, source, size, self.commits[threads], at)
        if self.options.late:
            self.copies.append(copy)
        else:
            self._land(copy)

    def commit(self, M: Array | None) -> None:
        self.commits = self.commits + (1 if M is None else M)

    def wait_copies(self, left: int, M: Array | None, at: int) -> None:
        """cp.async.wait_group: all but the last `left` groups arrive."""
        on = self.everyone if M is None else M
        kept = []
        for copy in self.copies:
            due = on[copy.threads] & (copy.group < self.commits[copy.threads] - left)
            if due.any():
                self._land(copy.part(due))
            if not due.all():
                kept.append(copy.part(~due))
        self.copies = kept

    # ---------------------------------------------------------------- how
    def _land(self, copy: Copy) -> None:
        self._check(self.memory, copy.source, copy.size, VALID | INIT, copy.threads, copy.at)
        unit = min(copy.size, 8)
        values = self.memory.gather(copy.source, unit, copy.size // unit)
        self.shared.scatter(copy.to, unit, values)
        self.shared.mark(copy.to, copy.size, INIT, COMING)

    def _active(self, address: Array, M: Array | None) -> tuple[Array, Array]:
        address = np.broadcast_to(address, self.threads)
        if M is None:
            return np.arange(self.threads), address
        threads = np.flatnonzero(M)
        return threads, address[threads]

    def _resolve(
        self, space: str, address: Array, size: int, at: int, threads: Array
    ) -> tuple[Space, Array]:
        """The memory and byte offsets in it; traps outside and off the alignment."""
        if space == "generic":
            shared = (address >> np.uint64(40)) == SHARED_WINDOW >> 40
            if shared.any() != shared.all():
                self.trap("addresses in different state spaces (not supported)", threads, at)
            space = "shared" if shared.all() else "global"
            if space == "shared":
                address = address - np.uint64(SHARED_WINDOW)
        bad = np.flatnonzero(address % np.uint64(size))
        if len(bad):
            what = f"misaligned: {size} bytes at {int(address[bad[0]]):#x}"
            self.trap(what, threads[bad], at)
        if space == "shared":
            return self.shared, self._resolve_shared(address, size, at, threads)
        offset: Array = (address - np.uint64(GLOBAL_BASE)).astype(np.int64)
        bad = np.flatnonzero((offset < 0) | (offset + size > self.memory.size))
        if len(bad):
            self.trap(f"no such address: {int(address[bad[0]]):#x}", threads[bad], at)
        return self.memory, offset

    def _resolve_shared(self, address: Array, size: int, at: int, threads: Array) -> Array:
        rank = (address >> np.uint64(24)).astype(np.int64)  # + 1; 0: the own CTA
        offset = (address & np.uint64(0xFFFFFF)).astype(np.int64) - SHARED_BASE
        cta = self.cta[threads]
        remote, cluster = rank > 0, self.launch.cluster
        if remote.any():
            cta = np.where(remote, cta // cluster * cluster + rank - 1, cta)
            self._visit(cta, remote & (rank <= cluster), threads, at)
        bad = np.flatnonzero((offset < 0) | (offset + size > self.shared_bytes) | (rank > cluster))
        if len(bad):
            what = f"outside shared memory of {self.shared_bytes} bytes: {size} bytes"
            self.trap(f"{what} at {offset[bad[0]]}", threads[bad], at)
        place: Array = cta * self.stride + offset
        return place

    def _visit(self, cta: Array, remote: Array, threads: Array, at: int) -> None:
        """Another CTA's shared memory: that must have begun, and not end before it knows of the
        access."""
        other = remote & (cta != self.cta[threads])
        if (self.waited[threads[other]] == 0).any():
            self.trap("shared memory of a CTA that may not have begun", threads[other], at)
        alive = np.any(self.live.reshape(-1, self.launch.cta_threads), axis=1)
        if not alive[cta[other]].all():
            self.trap("shared memory of a CTA that has ended", threads[other], at)
        np.maximum.at(self.visited_at, cta[other], self.arrived[threads[other]])

    def _describe(self, memory: Space, at: int) -> str:
        if isinstance(memory, Global):
            return memory.describe(at)
        return f"shared byte {at % self.stride}"

    def _check(
        self, memory: Space, at: Array, size: int, need: int, threads: Array, instruction: int
    ) -> None:
        write = bool(need & WRITABLE)
        bad = np.flatnonzero(~memory.allowed(at, size, need))
        if len(bad):
            first = int(at[bad[0]])
            states = memory.state[first : first + size]
            if not (states & VALID).all():
                why = "outside every array"
            elif (states & COMING).any():
                why = "a cp.async to it is under way"
            else:
                why = "read-only" if write else "never written"
            what = f"{'writes' if write else 'reads'} {size} bytes, {why}"
            self.trap(f"{what}: {self._describe(memory, first)}", threads[bad], instruction)
        if memory.accesses and self.options.races:
            by = Threads(
                *(self.who[threads], self.barriers[threads]),
                *(self.arrived[threads], self.waited[threads]),
                *(self.launch.cta_threads, self.launch.cluster_threads),
            )
            found = memory.accesses.note(at, size, by, write)
            if found:
                place, *pair = found
                cta = self.launch.cta_threads
                who = " with ".join(f"CTA {w // cta} thread {w % cta}" for w in pair)
                self.trap(f"race at {self._describe(memory, place)}: {who}", threads, instruction)

    def _count(
        self, what: str, memory: Space, at: Array, size: int, threads: Array, instruction: int
    ) -> None:
        if not self.options.count:
            return
        name = what + (".shared" if memory is self.shared else ".global" * (what != "cp.async"))
        if isinstance(memory, Global) and instruction not in self.counts.arrays:
            self.counts.arrays[instruction] = memory.array(int(at[0]))
        places, on = np.zeros(self.threads, np.int64), np.zeros(self.threads, bool)
        places[threads], on[threads] = at, True
        self.counts.note(name, places.reshape(-1, 32), on.reshape(-1, 32), size)
