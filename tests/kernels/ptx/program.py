"""An entry as basic blocks that run: stretches of instructions with no label, branch or meeting
point inside, each a Python function over arrays (translate.py)."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from . import classes
from .isa import ENDS, MEETINGS, NO_RESULT
from .parse import Entry, Instruction, Operand
from .translate import Translator

_NAME = re.compile(r"[%$\w.]+")


class BasicBlock:
    """run(m, R, M) does what it says, and returns the predicate of the branch at its end, or
    None."""

    run: Callable[[Any, Any, Any], Any]
    source: str

    def __init__(self, first: int, instructions: list[Instruction]):
        self.first, self.instructions = first, instructions
        # Where all who are meant have to be, before any goes on.
        self.gate = instructions[0] if instructions[0].opcode in MEETINGS else None
        last = instructions[-1]
        self.ends = last.opcode if last.opcode in ENDS else None
        self.label = str(last.operands[0]) if last.opcode == "bra" else None
        self.target = -1  # the block of the label
        self.classes = Counter(classes.of(i) for i in instructions)


class Program:
    def __init__(self, entry: Entry):
        self.entry = entry
        self.blocks = self._split()
        self.home, self.widths = self._find_shared_registers()
        translator = Translator(entry, self.home)
        self.symbols, self.param_bytes = translator.symbols, translator.param_bytes
        self.static_shared = translator.static_shared
        self.reached: set[int] = set()  # blocks that some thread has run
        for number, b in enumerate(self.blocks):
            lines = ["def run(m, R, M):"]
            for offset, i in enumerate(b.instructions):
                lines += ["    " + x for x in translator.translate(i, b.first + offset)]
            b.source = "\n".join([*lines, "    return None\n"])
            exec(compile(b.source, f"<{entry.name[:60]} block {number}>", "exec"), translator.names)
            b.run = translator.names["run"]

    def _split(self) -> list[BasicBlock]:
        instructions, labels = self.entry.instructions, self.entry.labels
        cuts = {0, *labels.values()}
        for n, i in enumerate(instructions):
            if i.opcode in MEETINGS:
                cuts.add(n)
            if i.opcode in ENDS:
                cuts.add(n + 1)
        starts = sorted(c for c in cuts if c < len(instructions))
        ends = [*starts[1:], len(instructions)]
        blocks = [BasicBlock(a, instructions[a:b]) for a, b in zip(starts, ends, strict=True)]
        place = {start: n for n, start in enumerate(starts)}
        for b in blocks:
            if b.label is not None:
                b.target = place[labels[b.label]]
        return blocks

    def _find_shared_registers(self) -> tuple[dict[str, int], list[int]]:
        """Registers that several blocks use, or that one uses before it writes: they live in R,
        and where only some threads run, the others' values are kept. The rest are a block's
        own."""
        owner: dict[str, int] = {}
        shared = set()
        for number, b in enumerate(self.blocks):
            for i in b.instructions:
                results = set() if i.predicate else set(names_of(i.operands[:1])) & _results(i)
                sources = names_of(i.operands[0 if i.opcode in NO_RESULT else 1 :])
                used = {*sources, i.predicate}
                for r in (*names_of(i.operands), i.predicate or ""):
                    if r in self.entry.registers:
                        begins = r in results and r not in used
                        if owner.setdefault(r, number if begins else -1) != number:
                            shared.add(r)
        places = sorted(shared)
        return {r: n for n, r in enumerate(places)}, [self.entry.registers[r] for r in places]


def names_of(operands: list[Operand]) -> list[str]:
    """Registers, symbols and numbers in operands."""
    return [
        name
        for o in operands
        for text in (o if isinstance(o, tuple) else (o,))
        for name in _NAME.findall(text)
    ]


def _results(i: Instruction) -> set[str]:
    return set() if i.opcode in NO_RESULT else set(names_of(i.operands[:1]))
