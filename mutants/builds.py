"""What is built of the copy, and how a test runs on it.

cpu      tests/kernels/cpu, without torch: a test is a program with its arguments
cuda     the kernels under the emulator, tests/kernels/simt: arguments of its program
binding  the package, against the torch at hand: a test is what pytest takes
python   the same package, with one file edited
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from . import Layer, Mutant
from .planting import VARIABLE

__all__ = ["FASTER", "build", "run"]

# A change for the sake of time: kernels compile by -O1 in a third of it.
FASTER = Mutant("cmake/cpu.cmake", "set(CPU_OPTIONS -O3", "set(CPU_OPTIONS -O1", "less time")


def _environment(tree: Path) -> dict[str, str]:
    path = f"{tree / 'python'}:{tree}"
    # No bytecode: an edit of the same length within the same second would not be seen.
    settings = {"FUSED_RMSNORM_CUDA": "0", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    env = dict(os.environ, **settings)
    env.pop(VARIABLE, None)
    flags = f"-include {shlex.quote(str(tree / 'switch.h'))}"
    return env | {"CXXFLAGS": f"{env.get('CXXFLAGS', '')} {flags}".strip()}


def _check(command: list[str], cwd: Path, env: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        text = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{shlex.join(command)} failed:\n{text}")


def _cuda_headers() -> list[str]:
    """Where CMake does not look by itself: beside nvcc."""
    nvcc = shutil.which("nvcc")
    folder = Path(nvcc).resolve().parents[1] / "include" if nvcc else Path()
    return [f"-DCUDA_INCLUDE={folder}"] if (folder / "cuda_fp16.h").exists() else []


def build(layer: Layer, tree: Path, jobs: int) -> None:
    env = _environment(tree)
    if layer.name in ("cpu", "cuda"):
        source = tree / "tests" / "kernels" / ("cpu" if layer.name == "cpu" else "simt")
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        folder = tree / "build" / layer.name
        headers = _cuda_headers() if layer.name == "cuda" else []
        configure = ["cmake", "-S", str(source), "-B", str(folder), "-DSANITIZE=", *generator]
        _check([*configure, *headers], tree, env)
        _check(["cmake", "--build", str(folder), "--parallel", str(jobs)], tree, env)
    else:
        _check(["make", "build", f"PYTHON={sys.executable}"], tree, env)


def run(layer: Layer, tree: Path, test: str, number: int, limit: float) -> str | None:
    """None if the test passes, else how it fails. ``number``: the mutant's, or 0."""
    env = _environment(tree) | {VARIABLE: str(number)}
    if layer.name == "cpu":
        command = [str(tree / "build" / "cpu" / test.split()[0]), *test.split()[1:]]
    elif layer.name == "cuda":
        command = [str(tree / "build" / "cuda" / "test_cuda_kernels"), *test.split()]
    else:
        command = [sys.executable, "-m", "pytest", "-x", "-q", *shlex.split(test)]
    try:
        done = subprocess.run(
            command, cwd=tree, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ends with signal {-done.returncode}"
    found = re.search(r"^FAILED (\S+)", done.stdout, re.M) or re.search(
        r"^ERROR (\S+)", done.stdout, re.M
    )
    return found[1].split("/")[-1].split("[")[0] if found else "fails"
