"""The CPU kernels of every instruction set here, driven from C++ (cpu): plain, under
AddressSanitizer and UBSan, and under ThreadSanitizer; and those for NEON, compiled for aarch64 and
run by an emulator."""

import shutil

import pytest
from kernel_builds import build, run

SANITIZERS = {"plain": "", "address": "address,undefined", "thread": "thread"}
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
SYSROOT = "/usr/aarch64-linux-gnu"


@pytest.mark.parametrize("kind", SANITIZERS)
def test_kernels(kind: str) -> None:
    folder = build(kind, f"-DSANITIZE={SANITIZERS[kind]}", target="cpu_kernels")
    assert run(folder / "cpu_kernels") == "failures: 0\n"


@pytest.mark.skipif(not shutil.which(COMPILER), reason=f"{COMPILER} is not installed")
@pytest.mark.skipif(not shutil.which(EMULATOR), reason=f"{EMULATOR} (qemu-user) is not installed")
def test_neon() -> None:
    folder = build(
        "neon",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}",
        target="cpu_kernels",
    )
    out = run(EMULATOR, "-L", SYSROOT, folder / "cpu_kernels", "NEON")
    assert out == "failures: 0\n"
