"""What nvcc makes of the CUDA kernels: no spills, registers for the blocks that the plan counts on,
16-byte loads and stores. Needs no GPU. The same PTX is executed by test_ptx_kernels.py;
ptx/build.py makes and keeps it.
"""

import re
from typing import NamedTuple

import pytest
from ptx import build
from ptx.build import TARGETS, Build

SOURCES = Build().units

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


class Kernel(NamedTuple):
    name: str
    stack: int  # bytes
    spilled: int  # bytes stored and loaded
    registers: int


@pytest.fixture(scope="module")
def compiled() -> Build:
    made = Build()
    made.everything()
    return made


def report_of(compiled: Build, source: str, target: int) -> str:
    return compiled.report(compiled.ptx(source, TARGETS[target]), target)


REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def kernels(report: str) -> list[Kernel]:
    found = [
        Kernel(n, int(stack), int(stores) + int(loads), int(registers))
        for n, stack, stores, loads, registers in REPORT.findall(report)
    ]
    assert len(found) == report.count("Compiling entry function") > 0
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills(compiled: Build, source: str, target: int) -> None:
    spilling = [k for k in kernels(report_of(compiled, source, target)) if k.stack or k.spilled]
    assert not spilling


@pytest.mark.parametrize("target", [100, 120])
@pytest.mark.parametrize("source", ["forward_bf16", "forward_f16"])
def test_no_spills_in_a_release(source: str, target: int) -> None:
    """What a release compiles for the newest architectures is made of PTX of their own, which
    takes a few registers more than that for sm_90. These kernels have the least to spare."""
    spilling = [k for k in kernels(Build().release_report(source, target)) if k.stack or k.spilled]
    assert not spilling


def serves_aligned_rows_only(name: str) -> bool:
    return bool(re.search(r"(?:for|back)ward_rowsI", name)) and "AccessE1" not in name


def writes_by_columns(name: str) -> bool:
    """Of a y wider than x: llama mode, whose rows go column by column."""
    return bool(re.search(r"forward_(?:rows_any|long)I(?:13__nv_bfloat16|6__half)f", name))


def bodies(ptx: str) -> dict[str, str]:
    """Entry name -> its text, from its launch bounds to its end."""
    parts = re.split(r"\.visible \.entry (\w+)", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("virtual", sorted(set(TARGETS.values())))
@pytest.mark.parametrize("source", SOURCES)
def test_wide_memory_access(compiled: Build, source: str, virtual: int) -> None:
    """Rows travel in 16-byte pieces; where all is aligned, as nothing else."""
    ptx = compiled.ptx(source, virtual).read_text()
    seen = 0
    for name, body in bodies(ptx).items():
        if "_columns" in name or "finalize" in name:
            continue  # read down columns, an element at a time, neighbours side by side
        if "ld.param" not in body:
            continue  # launched on other architectures only, and empty here
        seen += 1
        wide = re.findall(r"ld\.global(?:\.nc)?(?:\.v4\.[bfu]32|\.v2\.[bfu]64)", body)
        wide += re.findall(r"cp\.async\.c[ag]\.shared\.global \[\S+\], \[\S+\], 16", body)
        assert wide, name
        pieces = re.search(r"st\.global\.wb\.v4\.[bfu]32", body)
        assert pieces or writes_by_columns(name), name
        if serves_aligned_rows_only(name):
            narrow = re.findall(
                r"(?:ld\.global(?:\.nc)?|st\.global(?:\.wb)?)\.[bfu](?:8|16)\b", body
            )
            assert not narrow, (name, narrow)
            single = re.findall(r"ld\.global(?:\.nc)?\.[bfu](?:32|64)\b", body)
            assert len(single) <= 1, (name, single)  # the backward's rstd
    assert seen


@pytest.mark.parametrize("virtual", sorted(set(TARGETS.values())))
@pytest.mark.parametrize("source", SOURCES)
def test_sums_are_fused_where_written(compiled: Build, source: str, virtual: int) -> None:
    """No product that ptxas may fuse into a sum: it would in one kernel and not in another, and the
    bits of a row hung on its alignment or on what else is asked for (contracts 1 and 2)."""
    ptx = compiled.ptx(source, virtual).read_text()
    assert re.search(r"\bmul\.rn\.f(?:32|64)\b", ptx)
    assert re.search(r"\bfma\.rn\.f(?:32|64)\b", ptx)
    assert not re.search(r"\b(?:mul|mad)(?:\.ftz)?\.f(?:32|64)\b", ptx)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_registers_leave_the_plan_its_blocks(compiled: Build, source: str, target: int) -> None:
    """The grid of the backward counts on 512 threads a multiprocessor, of its 65536 registers. The
    plain forward of aligned rows is to have 1024; 768, or one block, where a wider weight or rows
    side by side in a block need the registers."""
    ptx = compiled.ptx(source, TARGETS[target]).read_text()
    headers = {name: body.split("{")[0] for name, body in bodies(ptx).items()}
    for kernel in kernels(report_of(compiled, source, target)):
        threads = int(re.findall(r"\.maxntid (\d+)", headers[kernel.name])[0])
        blocks = int((re.findall(r"\.minnctapersm (\d+)", headers[kernel.name]) or ["1"])[0])
        assert kernel.registers * threads * blocks <= 65536, kernel
        aligned = serves_aligned_rows_only(kernel.name)
        assert not (aligned and "backward_rows" in kernel.name) or threads * blocks == 512, kernel
        plain = re.search(r"forward_rowsI\w*RowTypesI(\w+?)EELi(\d+)ELb0ELb0E", kernel.name)
        if plain:
            wide_weight = plain[1].endswith("f") and plain[1] != "ff"
            side_by_side = int(plain[2]) < 6  # the shapes of plan.h with less than 128 threads
            expected = 768 if wide_weight or side_by_side else 1024
            assert blocks == max(expected // threads, 1), kernel
