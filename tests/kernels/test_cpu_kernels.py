"""The CPU kernels of every instruction set here, driven from C++ (cpu): plain, under
AddressSanitizer and UBSan, and under ThreadSanitizer; and those for NEON, compiled for aarch64 and
run by an emulator."""

import re
import shutil
from pathlib import Path

import pytest
from kernel_builds import build, run

SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.mark.parametrize("kind", SANITIZERS)
def test_kernels(kind: str) -> None:
    folder = build(kind, f"-DSANITIZE={SANITIZERS[kind]}", target="cpu_kernels")
    assert run(folder / "cpu_kernels") == "failures: 0\n"


def test_every_table_is_run_and_named() -> None:
    """A table of kernels that here.h lacks would be compiled and never run."""
    sources = "".join(path.read_text() for path in sorted(CSRC.glob("cpu/kernels_*.cpp")))
    tables = re.findall(r'^const Kernels (\w+) = \{"(\w+)"', sources, re.MULTILINE)
    assert len(tables) == sources.count("const Kernels ")
    here = (Path(__file__).parent / "cpu" / "here.h").read_text()
    assert sorted(re.findall(r"&cpu::(\w+),", here)) == sorted(table for table, _ in tables)
    said = (CSRC / "norm.h").read_text().split("const char* capability()")[0].rsplit("\n//", 1)[1]
    assert set(re.findall(r'"(\w+)"', said)) == {name for _, name in tables}


def test_gates() -> None:
    """exp(-z) to a unit in the last place; the same bits wherever there is a fused multiply-add."""
    folder = build("plain", "-DSANITIZE=", target="gates")
    assert run(folder / "gates", 1021) == "failures: 0\n"


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} (qemu-user) is not installed")
def test_neon() -> None:
    options = (
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
    )
    for program, argument in (("cpu_kernels", "NEON"), ("gates", 40009)):
        folder = build("neon", *options, target=program)
        out = run(EMULATOR, "-L", SYSROOT, folder / program, argument)
        assert out == "failures: 0\n"
