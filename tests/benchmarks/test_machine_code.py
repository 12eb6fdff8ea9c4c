"""Machine instructions and how often they run (benchmarks/compiled/machine_code.py): of hand-made
listings, and of a kernel whose count is known."""

from pathlib import Path
from typing import Any

import pytest
from ptx import build
from ptx.build import Build
from ptx.parse import Module
from ptx.program import Program

from benchmarks.compiled import machine_code
from benchmarks.compiled.machine_code import disassembler, instructions, runs_of_lines

LINES = {1: 1.0, 2: 10.0, 3: 0.0, 4: 1.0}


def listing(*rows: str) -> str:
    """As nvdisasm writes it: "2 FADD R1" is an instruction of line 2, "label:" a label."""
    out = []
    for at, row in enumerate(rows):
        if row.endswith(":"):
            out.append(row)
        else:
            line, text = row.split(" ", 1)
            out += [f'\t//## File "kernel.ptx", line {line}', f"        /*{at:04x}*/   {text} ;"]
    return "\n".join(out)


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        (["1 FADD R1, R2, R3", "1 EXIT"], {"float": 1, "branch": 1}),
        # A loop of ten turns; a constant that was moved before it.
        (
            ["1 IADD3 R1", "2 LDC R2", ".L_x_0:", "2 FADD R1", "2 @P0 BRA `(.L_x_0)", "1 EXIT"],
            {"integer": 1, "move": 1, "float": 10, "branch": 11},
        ),
        # What is under a predicate takes its turn; the end of the block says how often.
        (["3 @P0 FADD R1", "3 @P0 FADD R2", "2 @!P1 BRA `(.L_x_1)"], {"float": 20, "branch": 10}),
        # A block that falls through: what cannot be moved says it, however much else is there.
        (
            ["3 @P0 FADD R1", "3 FADD R2", "4 STG.E [R1]", ".L_x_2:"],
            {"float": 2, "store.global": 1},
        ),
        # The way round a division's rare case, and the function that it calls.
        (
            ["1 @!P0 BRA `(.L_x_3)", "1 MOV R1", "1 CALL.REL.NOINC `(f)", ".L_x_3:", "1 EXIT"],
            {"branch": 2},
        ),
        (["1 EXIT", "$__internal_0:", "1 FADD R1", "1 RET.REL R2"], {"branch": 1}),
        # A loop that ptxas has unrolled: what stands in it twice runs half as often.
        (
            [".L_x_4:", "2 STG.E [R1]", "2 STG.E [R2]", "2 @P0 BRA `(.L_x_4)", "1 EXIT"],
            {"store.global": 10, "branch": 6},
        ),
        (["1 EXIT", "1 NOP", "1 NOP"], {"branch": 1}),
        (["1 IMAD.MOV.U32 R1", "1 IMAD.WIDE R2", "1 EXIT"], {"move": 1, "integer": 1, "branch": 1}),
    ],
)
def test_counts_of_listings(
    monkeypatch: pytest.MonkeyPatch, rows: list[str], want: dict[str, float]
) -> None:
    monkeypatch.setattr(machine_code, "disassembler", lambda: "nvdisasm")
    monkeypatch.setattr(machine_code, "_compile", lambda *_: Path("kernel.cubin"))
    monkeypatch.setattr(machine_code, "run", lambda *_: listing(*rows))
    got = instructions(None, Path("kernel.ptx"), LINES, 90)  # type: ignore[arg-type]
    assert {kind: n for kind, n in got.items() if n} == want


KERNEL = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(
	.param .u64 k_param_0
)
{
	.reg .pred %p<3>;
	.reg .b32 %r<5>;
	.reg .f32 %f<4>;
	.reg .b64 %rd<4>;
	ld.param.u64 %rd1, [k_param_0];
	cvta.to.global.u64 %rd2, %rd1;
	ld.global.f32 %f1, [%rd2];
	mov.u32 %r1, %ctaid.x;
	bar.sync 0;
$L1:
	.pragma "nounroll";
	fma.rn.f32 %f1, %f1, %f1, %f1;
	add.s32 %r1, %r1, 1;
	setp.lt.s32 %p1, %r1, 100;
	@%p1 bra $L1;
	bar.sync 0;
	st.global.f32 [%rd2], %f1;
	ret;
}
"""


@pytest.mark.skipif(not disassembler(), reason="needs nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_a_loop(tmp_path: Path) -> None:
    """A hundred turns, each with one operation."""
    module = Module(KERNEL)
    program: Any = Program(module.entry("k"))
    runs: dict[int, float] = dict.fromkeys(range(len(program.blocks)), 1.0)
    (loop,) = (n for n, b in enumerate(program.blocks) if b.label)
    runs[loop] = 100.0
    path = tmp_path / "k.ptx"
    path.write_text(module.text)
    lines = runs_of_lines(module.entry("k"), program, runs)
    got = instructions(Build(work=tmp_path), path, lines, 80)
    assert got["store.global"] == got["load.global"] == 1
    assert got["barrier"] == 2
    assert got["float"] == 100
    assert 100 < got["branch"] < 105
