"""What nvcc makes of the CUDA kernels: no spills, registers for the blocks that the plan counts on,
16-byte loads and stores. Needs no GPU.

PTX is made for compute_80 (without clusters) and compute_90 and kept in build/ptx until a source
changes; ptxas compiles it for sm_80, sm_90 and sm_120.
"""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*ward_*.cu"))
FLAGS = ("-std=c++17", "-O3", "-fmad=false")  # as in CMakeLists.txt
TARGETS = {"sm_80": "compute_80", "sm_90": "compute_90", "sm_120": "compute_90"}

pytestmark = pytest.mark.skipif(
    not (shutil.which("nvcc") and shutil.which("ptxas")), reason="needs nvcc and ptxas"
)


class Kernel(NamedTuple):
    name: str
    stack: int  # bytes
    spilled: int  # bytes stored and loaded
    registers: int


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def made(source: Path, virtual: str, key: str) -> tuple[str, dict[str, str]]:
    """The PTX of one source, and what ptxas says about it for each target."""
    folder = ROOT / "build" / "ptx" / key
    folder.mkdir(parents=True, exist_ok=True)
    ptx = folder / f"{source.stem}-{virtual}.ptx"
    if not ptx.exists():
        part = ptx.with_suffix(".part")
        run("nvcc", *FLAGS, f"-arch={virtual}", "-ptx", source, "-o", part)
        part.rename(ptx)
    said = {}
    for target in (t for t, v in TARGETS.items() if v == virtual):
        log = folder / f"{source.stem}-{target}.txt"
        if not log.exists():
            log.write_text(run("ptxas", "-v", f"-arch={target}", ptx, "-o", "/dev/null"))
        said[target] = log.read_text()
    return ptx.read_text(), said


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], tuple[str, dict[str, str]]]:
    digest = hashlib.sha256(run("nvcc", "--version").encode())
    for file in [*sorted((ROOT / "csrc" / "cuda").iterdir()), ROOT / "csrc" / "norm.h"]:
        digest.update(file.read_bytes())
    jobs = [(s, v) for s in SOURCES for v in ("compute_80", "compute_90")]
    jobs.sort(key=lambda job: "backward" not in job[0].name)  # the long ones first
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: made(*job, key=digest.hexdigest()[:16]), jobs)
        return {(s.stem, v): r for (s, v), r in zip(jobs, results, strict=True)}


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
@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_no_spills(
    compiled: dict[tuple[str, str], tuple[str, dict[str, str]]], source: str, target: str
) -> None:
    _, said = compiled[source, TARGETS[target]]
    spilling = [k for k in kernels(said[target]) if k.stack or k.spilled]
    assert not spilling


def serves_aligned_rows_only(name: str) -> bool:
    return bool(re.search(r"(?:for|back)ward_rowsI", name))


def bodies(ptx: str) -> dict[str, str]:
    """Entry name -> its text, from its launch bounds to its end."""
    parts = re.split(r"\.visible \.entry (\w+)", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("virtual", sorted(set(TARGETS.values())))
@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_wide_memory_access(
    compiled: dict[tuple[str, str], tuple[str, dict[str, str]]], source: str, virtual: str
) -> None:
    """Rows travel in 16-byte pieces; where all is aligned, as nothing else."""
    ptx, _ = compiled[source, virtual]
    seen = 0
    for name, body in bodies(ptx).items():
        if "backward_columns" in name or "finalize" in name:
            continue  # read down columns, an element at a time, neighbours side by side
        if "ld.param" not in body:
            continue  # launched on other architectures only, and empty here
        seen += 1
        wide = re.findall(r"ld\.global(?:\.nc)?(?:\.v4\.[bfu]32|\.v2\.[bfu]64)", body)
        wide += re.findall(r"cp\.async\.c[ag]\.shared\.global \[\S+\], \[\S+\], 16", body)
        assert wide, name
        assert re.search(r"st\.global\.wb\.v4\.[bfu]32", body), name
        if serves_aligned_rows_only(name):
            narrow = re.findall(
                r"(?:ld\.global(?:\.nc)?|st\.global(?:\.wb)?)\.[bfu](?:8|16)\b", body
            )
            assert not narrow, (name, narrow)
            single = re.findall(r"ld\.global(?:\.nc)?\.[bfu](?:32|64)\b", body)
            assert len(single) <= 1, (name, single)  # the backward's rstd
    assert seen


@pytest.mark.parametrize("virtual", sorted(set(TARGETS.values())))
@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_sums_are_fused_where_written(
    compiled: dict[tuple[str, str], tuple[str, dict[str, str]]], source: str, virtual: str
) -> None:
    """No product that ptxas may fuse into a sum: it would in one kernel and not in another, and the
    bits of a row hung on its alignment or on what else is asked for (contracts 1 and 2)."""
    ptx, _ = compiled[source, virtual]
    assert re.search(r"\bmul\.rn\.f(?:32|64)\b", ptx)
    assert re.search(r"\bfma\.rn\.f(?:32|64)\b", ptx)
    assert not re.search(r"\b(?:mul|mad)(?:\.ftz)?\.f(?:32|64)\b", ptx)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [s.stem for s in SOURCES])
def test_registers_leave_the_plan_its_blocks(
    compiled: dict[tuple[str, str], tuple[str, dict[str, str]]], source: str, target: str
) -> None:
    """The grid of the backward counts on 512 threads a multiprocessor, of its 65536 registers; the
    plain forward of aligned rows is to have 1024; with a wider weight or several rows in flight 768
    or one block of 512."""
    ptx, said = compiled[source, TARGETS[target]]
    headers = {name: body.split("{")[0] for name, body in bodies(ptx).items()}
    for kernel in kernels(said[target]):
        threads = int(re.findall(r"\.maxntid (\d+)", headers[kernel.name])[0])
        blocks = int((re.findall(r"\.minnctapersm (\d+)", headers[kernel.name]) or ["1"])[0])
        assert kernel.registers * threads * blocks <= 65536, kernel
        assert "backward_rows" not in kernel.name or threads * blocks == 512, kernel
        plain = re.search(r"forward_rowsI\w*ELb0ELb0EEE", kernel.name)
        assert not plain or threads * blocks in (1024, 768, 512), kernel
