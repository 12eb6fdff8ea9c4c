"""Bytes in flight: how much a thread has requested from memory before it waits for the first."""

from collections.abc import Iterable, Mapping

from ptx.isa import NO_RESULT, WIDTH
from ptx.parse import Instruction
from ptx.program import Program, names_of

__all__ = ["bytes_in_flight"]


def _bytes(i: Instruction) -> int:
    count = len(i.operands[0]) if isinstance(i.operands[0], tuple) else 1
    return count * WIDTH[i.type] // 8


class _Loads:
    """ld.global: in flight until an instruction needs what was loaded, and all loads before it."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}  # register -> the load it comes from
        self.sizes: dict[int, int] = {}  # load -> bytes

    def issue(self, registers: Iterable[str], size: int) -> None:
        number = max(self.sizes, default=0) + 1
        self.sizes[number] = size
        self.waiting |= dict.fromkeys(registers, number)

    def need(self, registers: Iterable[str]) -> None:
        latest = max((self.waiting.get(r, 0) for r in registers), default=0)
        if latest:
            self.sizes = {n: s for n, s in self.sizes.items() if n > latest}
            self.waiting = {r: n for r, n in self.waiting.items() if n > latest}

    def moved(self, to: Iterable[str], sources: Iterable[str]) -> None:
        latest = max((self.waiting.get(r, 0) for r in sources), default=0)
        for register in to:
            self.waiting.pop(register, None)
            if latest:
                self.waiting[register] = latest


def bytes_in_flight(
    program: Program, trace: Iterable[int], arrays: Mapping[int, str], streams: Iterable[str]
) -> int:
    """The most that a thread has on its way at once, of the arrays `streams`, which come from
    memory.

    Args:
        trace: basic blocks as a thread ran them.
        arrays: what each load or copy reads.
    """
    loads, streamed, most = _Loads(), set(streams), 0
    groups: list[int] = []  # bytes of cp.async, by group
    group = 0
    for block in trace:
        b = program.blocks[block]
        for at, i in enumerate(b.instructions, b.first):
            full = ".".join([i.opcode, *i.modifiers])
            operands = i.operands if i.opcode in NO_RESULT else i.operands[1:]
            if full.startswith("cp.async.wait"):
                left = 0 if full.endswith("wait_all") else int(str(i.operands[0]))
                groups = groups[len(groups) - left :] if left else []
            elif full.startswith("cp.async.commit"):
                groups, group = [*groups, group], 0
            elif i.opcode == "cp":
                group += int(str(i.operands[2])) if arrays.get(at) in streamed else 0
            elif i.opcode == "mov":  # also into halves: ptxas makes nothing of it
                loads.moved(names_of(i.operands[:1]), names_of(i.operands[1:]))
            else:
                loads.need(names_of(operands))
                if full.startswith("ld.global") and arrays.get(at) in streamed:
                    loads.issue(names_of(i.operands[:1]), _bytes(i))
            most = max(most, sum(loads.sizes.values()) + sum(groups) + group)
    return most
