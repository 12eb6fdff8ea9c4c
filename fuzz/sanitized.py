"""The whole extension once more, under AddressSanitizer and UBSan: built into a folder of its own.

torch and Python are as they are, not instrumented: the sanitizers' runtime is preloaded, so that
every allocation, torch's too, lies between poisoned bytes, and every load and store of this package
looks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SANITIZERS = "address,undefined"
OPTIONS = {
    # Python and torch keep what they allocated to the end; a call with absurd sizes has to get its
    # exception, as without the sanitizer.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096:"
    "handle_abort=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def build(sanitizers: str = SANITIZERS) -> Path:
    """The folder to put on PYTHONPATH. Builds what has changed (some minutes, the first time).

    Raises:
        SystemExit: CMake failed, and has said why.
    """
    sys.path.insert(0, str(ROOT / "cmake"))
    import build as driver

    folder = ROOT / "build" / f"sanitized-{sanitizers.replace(',', '-')}"
    package = folder / "python" / "fused_rmsnorm"
    shutil.copytree(
        ROOT / "python" / "fused_rmsnorm",
        package,
        ignore=shutil.ignore_patterns("*.so", "lib", "include", "share", "__pycache__"),
        dirs_exist_ok=True,
    )
    cmake, ninja = driver.tool("cmake"), driver.tool("ninja")
    if cmake is None:
        raise SystemExit("the sanitized build needs CMake: pip install cmake")
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder / "cmake"), "-DFUSED_RMSNORM_CUDA=0"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DTORCH_ROOT={driver.torch_root()}"),
        f"-DCMAKE_INSTALL_PREFIX={package}",
        f"-DFUSED_RMSNORM_SANITIZE={sanitizers}",
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    ]
    for command in (
        configure,
        [cmake, "--build", str(folder / "cmake"), "--parallel", jobs],
        [cmake, "--install", str(folder / "cmake")],
    ):
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise SystemExit(f"failed: {' '.join(command)}")
    return package.parent


def environment(package: Path) -> dict[str, str]:
    """What a process that loads the sanitized package has to be started with."""
    compiler = os.environ.get("CXX", "c++")
    # libstdc++, too: the runtime looks for its functions when it starts, before torch brings it.
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {**OPTIONS, "LD_PRELOAD": " ".join(libraries), "PYTHONPATH": str(package)}


if __name__ == "__main__":
    print(build())
