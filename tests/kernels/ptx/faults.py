"""Plants faults in compiled kernels, to see that they are caught: each instruction that matters to
other threads or to memory left out, one at a time, waits that are too short, shuffles that reach
too far.

In PTX rather than in the sources: nothing has to be compiled again, and every such instruction has
its turn, whatever the sources look like.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .call import Mismatch, call
from .cases import Case
from .isa import Trap
from .kernels import Kernels
from .machine import Options
from .parse import Entry, Instruction
from .program import Program


def drop(entry: Entry, at: int) -> Entry:
    instructions = entry.instructions[:at] + entry.instructions[at + 1 :]
    labels = {name: place - (place > at) for name, place in entry.labels.items()}
    return replace(entry, instructions=instructions, labels=labels)


def change(entry: Entry, at: int, operand: int, value: str) -> Entry:
    i = entry.instructions[at]
    operands = [*i.operands[:operand], value, *i.operands[operand + 1 :]]
    changed = replace(i, operands=operands, text=f"{i.text} (changed)")
    return replace(
        entry, instructions=[*entry.instructions[:at], changed, *entry.instructions[at + 1 :]]
    )


def _number(entry: Entry, at: int, operand: int) -> int:
    """A constant operand, or the one that its register is given."""
    text = entry.instructions[at].operands[operand]
    if text in entry.registers:
        (text,) = (i.operands[1] for i in entry.instructions if i.operands[:1] == [text])
    return int(str(text), 0)


def wait_shorter(entry: Entry, at: int) -> Entry:
    """cp.async.wait_group N waits for all groups but N."""
    return change(entry, at, 0, str(_number(entry, at, 0) + 1))


def shuffle_elsewhere(entry: Entry, at: int) -> Entry:
    """From the next lane, or from one lane further. Of pairs of lanes that have the same number
    already, it does not matter which one it is from: there, from within the pair."""
    number = _number(entry, at, 2)
    pairs = "bfly" in entry.instructions[at].modifiers
    return change(entry, at, 2, str(number // 2 if pairs else number + 1))


def shuffle_wider(entry: Entry, at: int) -> Entry | None:
    """The segments of a shuffle twice as wide, where they are not whole warps anyhow."""
    control = _number(entry, at, 3)
    segment = control >> 8 & 31
    return change(entry, at, 3, str(control & 0xFF | (segment << 1 & 31) << 8)) if segment else None


def mask_shorter(entry: Entry, at: int) -> Entry:
    return change(entry, at, 4, "0x7fffffff")


def is_(*full: str) -> Callable[[Instruction], bool]:
    """Whose opcode with its modifiers begins so."""

    def check(i: Instruction) -> bool:
        return ".".join([i.opcode, *i.modifiers]).startswith(full)

    return check


Mutation = tuple[Callable[[Instruction], bool], Callable[[Entry, int], Entry | None]]
FAULTS: dict[str, Mutation] = {
    "barrier dropped": (is_("bar.sync", "barrier.sync"), drop),
    "half of a cluster's barrier dropped": (is_("barrier.cluster"), drop),
    "wait for copies one group short": (is_("cp.async.wait_group"), wait_shorter),
    "wait for copies dropped": (is_("cp.async.wait_group"), drop),
    "copy dropped": (is_("cp.async.cg", "cp.async.ca"), drop),
    "shuffle from another lane": (is_("shfl"), shuffle_elsewhere),
    "shuffle of another width": (is_("shfl.sync.idx"), shuffle_wider),
    "shuffle's mask a lane short": (is_("shfl"), mask_shorter),
    "store to shared memory dropped": (is_("st.shared", "st.f32", "st.f64"), drop),
    "store to global memory dropped": (is_("st.global"), drop),
}
HOW = tuple(
    Options(late=late, descending=descending, races=True)
    for late, descending in ((True, False), (False, True))
)


@dataclass(frozen=True)
class Planted:
    fault: str
    kernel: str
    instruction: str
    told: str  # or nothing: it has survived


def _told(kernels: Kernels, case: Case, arch: int, direction: str) -> str:
    for options in HOW:
        try:
            call(kernels, case, arch, direction, options)
        except (Trap, Mismatch) as e:
            return str(e)
    return ""


def plant(kernels: Kernels, case: Case, arch: int, direction: str) -> Iterator[Planted]:
    """Every fault in every kernel of a call, where the call gets to it."""
    found = call(kernels, case, arch, direction, HOW[0])
    unit = f"{direction}_{case.x}"
    for kernel in dict.fromkeys(launch.kernel for launch, _ in found.launched):
        key = (unit, arch, kernel)
        sound = kernels.programs[key]
        reached = {
            b.first + n
            for number in sound.reached
            for b in (sound.blocks[number],)
            for n in range(len(b.instructions))
        }
        for fault, (matches, mutate) in FAULTS.items():
            for at, i in enumerate(sound.entry.instructions):
                planted = mutate(sound.entry, at) if at in reached and matches(i) else None
                if planted:
                    kernels.programs[key] = Program(planted)
                    try:
                        told = _told(kernels, case, arch, direction)
                    finally:
                        kernels.programs[key] = sound
                    yield Planted(fault, kernel, f"line {i.line}: {i.text}", told)
