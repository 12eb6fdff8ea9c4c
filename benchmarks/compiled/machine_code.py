"""What ptxas makes of a kernel, and how often each instruction of that runs.

The PTX is executed (tests/kernels/ptx); the machine code is only read. What joins them are line
numbers: ptxas is told that every instruction of the PTX is a line of a source file, and nvdisasm
says from which of these lines an instruction of the machine code comes. So a basic block of machine
code runs as often as the PTX that it was made from.
"""

import importlib.util
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ptx.build import Build, run, void
from ptx.build import made as made_once
from ptx.parse import Entry
from ptx.program import Program

__all__ = ["disassembler", "instructions", "registers", "runs_of_lines"]

_CLASSES = {
    "load.global": "LDG",
    "load.shared": "LDS LDSM",
    "store.global": "STG ST RED",
    "store.shared": "STS",
    "cp.async": "LDGSTS LDGDEPBAR DEPBAR",
    "shuffle": "SHFL VOTE VOTEU REDUX",
    "barrier": "BAR UCGABAR_ARV UCGABAR_WAIT MEMBAR ERRBAR CCTL WARPSYNC NANOSLEEP",
    "convert": "F2F F2FP I2F I2FP F2I HADD2",
    "float": "FADD FMUL FFMA FMNMX FCHK MUFU DADD DMUL DFMA HMUL2 HFMA2 FADD2 FMUL2 FFMA2",
    "predicate": "ISETP UISETP FSETP DSETP PLOP3 UPLOP3 P2R R2P",
    "select": "SEL USEL FSEL",
    "branch": "BRA BSSY BSYNC EXIT RET CALL BREAK BMOV YIELD BRX",
    "move": "MOV UMOV LDC ULDC LDCU S2R S2UR CS2R R2UR",
}
_CONSTANT = re.compile(r"U?LDC|S2U?R|CS2R")
_STAY = ("store.global", "store.shared", "cp.async", "shuffle", "barrier")
_CLASS_OF = {opcode: kind for kind, opcodes in _CLASSES.items() for opcode in opcodes.split()}
_LINE = re.compile(r'//## File "[^"]*", line (\d+)')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)[^;]*;")
_LABEL = re.compile(r"^\s*([.$\w]+):")
_USED = re.compile(r"Used (\d+) registers")


def disassembler() -> str | None:
    """nvdisasm: of a CUDA toolkit, or of the Python package nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm"):
        return found
    package = importlib.util.find_spec("nvidia")
    places = (package.submodule_search_locations if package else None) or []
    return next((str(p) for place in places for p in Path(place).glob("*/bin/nvdisasm")), None)


def runs_of_lines(entry: Entry, program: Program, blocks: Mapping[int, float]) -> dict[int, float]:
    """Line of the PTX -> how many warps ran it, from that of each basic block of the program."""
    return {
        i.line: blocks.get(number, 0.0)
        for number, block in enumerate(program.blocks)
        for i in entry.instructions[block.first : block.first + len(block.instructions)]
    }


def _located(ptx: str, lines: Mapping[int, float]) -> str:
    """PTX whose instructions say on which line of `ptx` they stand."""
    out = []
    for number, text in enumerate(ptx.splitlines(), 1):
        if number in lines:
            out.append(f".loc 1 {number} 0")
        out.append(text)
        if text.startswith(".address_size"):
            out.append('.file 1 "kernel.ptx"')
    return "\n".join([*out, ""])


def _compile(build: Build, ptx: Path, lines: Mapping[int, float], target: int) -> Path:
    located = build.keep(_located(ptx.read_text(), lines), "located")
    path = located.with_name(f"{located.stem}-sm_{target}.cubin")
    command = ("ptxas", "-v", "-lineinfo", f"-arch=sm_{target}", located, "-o")
    return made_once(
        path, lambda part: void(path.with_suffix(".txt").write_text(run(*command, part)))
    )


def registers(build: Build, ptx: Path, lines: Mapping[int, float], target: int) -> int:
    """Of a thread."""
    used = _USED.search(_compile(build, ptx, lines, target).with_suffix(".txt").read_text())
    assert used
    return int(used[1])


def instructions(
    build: Build, ptx: Path, lines: Mapping[int, float], target: int
) -> dict[str, float]:
    """Warp instructions by class.

    Args:
        ptx: a file with one kernel
        lines: of runs_of_lines, for this file
        target: 80, 90, ...
    """
    tool = disassembler()
    assert tool, "needs nvdisasm"
    text = run(tool, "-g", "-c", _compile(build, ptx, lines, target))
    blocks = [(block, _runs(block, lines)) for block in _blocks(text)]
    stands: defaultdict[int, float] = defaultdict(float)  # line: how often it would run
    for block, runs in blocks:
        for i in block:
            if _is_unique(i):
                stands[i.line] += runs
    total: defaultdict[str, float] = defaultdict(float)
    for block, runs in blocks:
        # Unrolled, or at the end of several paths, a block stands several times, and each of them
        # runs less often.
        known = [i.line for i in block if stands.get(i.line)]
        share = min((lines[line] / stands[line] for line in known), default=1.0)
        for i in block:
            total[_class(i.opcode)] += runs * min(share, 1.0)
    return dict(total)


class _Instruction(NamedTuple):
    opcode: str  # with its modifiers
    predicated: bool
    line: int  # of the PTX


Block = list[_Instruction]


def _blocks(text: str) -> Iterator[Block]:
    """Basic blocks of machine code, without the functions at its end, that do what is rare: the
    division of numbers of 64 bits or by a number that is nearly zero."""
    block: Block = []
    line = 0
    for row in text.splitlines():
        if found := _LINE.search(row):
            line = int(found[1])
        elif found := _LABEL.match(row):
            yield block
            block = []
            if found[1].startswith("$__internal"):
                return
        elif (found := _INSTRUCTION.search(row)) and found[2] != "NOP":
            block.append(_Instruction(found[2], bool(found[1]), line))
            if _branches(found[2]):
                yield block
                block = []
    yield block


def _runs(block: Block, lines: Mapping[int, float]) -> float:
    """How often a block runs: as often as the branch at its end; without one, as what cannot be
    moved to elsewhere; without that, as most of what has no predicate and is no constant. For
    arithmetic may have been moved there, constants most of all, or be under a predicate in place of
    a branch."""
    if not block or block[-1].opcode.startswith("CALL"):
        return 0.0
    ends = [i for i in block[-1:] if _branches(i.opcode)]
    stays = [i for i in block if not i.predicated and _class(i.opcode) in _STAY]
    others = [i for i in block if not i.predicated and not _CONSTANT.match(i.opcode)]
    counts = [lines[i.line] for i in ends or stays or others or block if i.line in lines]
    return Counter(counts).most_common(1)[0][0] if counts else 0.0


def _is_unique(i: _Instruction) -> bool:
    """Whether the machine code has it as often as the PTX, if the block stands there once."""
    return not i.predicated and i.opcode.startswith(("STG", "SHFL", "BAR"))


def _branches(opcode: str) -> bool:
    return _class(opcode) == "branch" and not opcode.startswith(("BSSY", "BSYNC", "BMOV"))


def _class(opcode: str) -> str:
    if opcode.startswith(("IMAD.MOV", "HFMA2.MMA")):  # a move, by a pipeline that is idle
        return "move"
    return _CLASS_OF.get(opcode.split(".")[0], "integer")
