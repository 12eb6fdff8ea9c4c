"""The CPU kernels of every instruction set here, driven from C++ (tests/cpp/kernels): plain, under
AddressSanitizer and UBSan, and under ThreadSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "cpp" / "kernels"
BUILDS = {"plain": "", "address": "address,undefined", "thread": "thread"}


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize("build", BUILDS)
def test_kernels(build: str) -> None:
    folder = DRIVER.parents[2] / "build" / f"cpu-kernels-{build}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", "-S", DRIVER, "-B", folder, *generator, f"-DSANITIZE={BUILDS[build]}")
    run("cmake", "--build", folder, "--parallel", os.cpu_count() or 1)
    assert run(folder / "cpu_kernels") == "failures: 0\n"
