"""Instructions per element of the CPU kernels, counted, not timed.

The AVX2 kernels run under ``valgrind --tool=callgrind``. It does not know AVX-512, so those kernels
are stepped through, one instruction after the other (ptrace). Counts depend on the compiler: the
file says which one they come from.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["COUNTED", "KEPT", "build", "compiler", "count", "missing"]

COUNTED = ("AVX2", "AVX512")
KEPT = Path(__file__).parents[1] / "results" / "counts" / "cpu_instructions.json"
DRIVER = Path(__file__).parents[2] / "tests" / "kernels" / "cpu"


def _run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout}{done.stderr[-5000:]}")
    return done.stdout


def build(folder: Path) -> Path:
    """The driver, compiled into folder with the library's own flags."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    _run("cmake", "-S", DRIVER, "-B", folder, *generator)
    _run("cmake", "--build", folder, "--target", "counts", "--parallel", os.cpu_count() or 1)
    return folder / "counts"


def compiler(folder: Path) -> str:
    """Name and version of what compiled there, e.g. "GNU 12.2.0"."""
    (found,) = folder.glob("CMakeFiles/*/CMakeCXXCompiler.cmake")
    values = dict(re.findall(r'set\((CMAKE_CXX_COMPILER_\w+) "([^"]*)"\)', found.read_text()))
    return f"{values['CMAKE_CXX_COMPILER_ID']} {values['CMAKE_CXX_COMPILER_VERSION']}"


def missing(driver: Path, kernels: str) -> str:
    """Why these kernels cannot be counted here; "" if they can."""
    if kernels == "AVX2" and not shutil.which("valgrind"):
        return "valgrind is not installed"
    try:
        _run(driver, kernels, "step", "no case")
    except RuntimeError as error:
        return str(error).strip().splitlines()[-1]
    return ""


def count(driver: Path, kernels: str, scratch: Path, *stepped: str) -> dict[str, float]:
    """Case -> instructions per element of one call. ``stepped``: of the kernels that are stepped
    through, which takes two minutes for all cases, only these."""
    pairs = (line.rsplit(": ", 1) for line in _run(driver).splitlines())
    elements = {name: int(n) for name, n in pairs}
    if kernels == "AVX2":
        out = f"--callgrind-out-file={scratch / 'callgrind'}"
        _run("valgrind", "--tool=callgrind", out, driver, kernels, "callgrind")
        total = {}
        for dump in scratch.glob("callgrind.*"):
            text = dump.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.M)
            summary = re.search(r"^summary: (\d+)", text, re.M)
            if name and summary:
                total[name[1]] = int(summary[1])
    else:
        pairs = (
            line.rsplit(": ", 1) for line in _run(driver, kernels, "step", *stepped).splitlines()
        )
        total = {name: int(n) for name, n in pairs}
    return {name: round(total[name] / n, 3) for name, n in elements.items() if name in total}
