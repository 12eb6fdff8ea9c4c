"""Drives CMake: configures, builds and installs the one project into a package folder.

``python cmake/build.py`` builds in place, into python/fused_rmsnorm (``make build``); setup.py
calls ``build`` for pip. Needs CMake and, if it is there, uses ninja; no setuptools.

FUSED_RMSNORM_CUDA=0|1     CUDA half off, or its absence an error; otherwise it is built where torch
                           has CUDA and there is an nvcc
FUSED_RMSNORM_BUILD_DIR    where CMake builds (default: a folder per interpreter under build/)
FUSED_RMSNORM_TORCHES      folders of torch packages, one for each minor version, as in PATH:
                           the package then serves all of them (default: this interpreter's torch)
TORCH_CUDA_ARCH_LIST       as for torch's own extensions
MAX_JOBS                   parallel compilers (default: all cores)
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str) -> "str | None":
    """A program that pip may have put beside the interpreter, which need not be on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def torch_root() -> str:
    """The folder of this interpreter's torch, which is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"fused_rmsnorm is built against an installed torch, and {sys.executable} has none: "
            "install torch >= 2.11, then pip install --no-build-isolation ."
        )
    return spec.submodule_search_locations[0]


def torch_roots() -> "list[str]":
    """The torch packages that are built against."""
    given = os.environ.get("FUSED_RMSNORM_TORCHES")
    return given.split(os.pathsep) if given else [torch_root()]


def build(package: Path) -> None:
    """``package``: the folder fused_rmsnorm that gets the libraries, headers and CMake files.

    Raises:
        SystemExit: CMake or torch is missing, or CMake failed (and has said why).
    """
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None:
        raise SystemExit(
            "fused_rmsnorm is built with CMake >= 3.24, which is missing: pip install cmake"
        )
    # What goes elsewhere names no path of this machine: in symbol tables nvcc leaves names of its
    # temporary files, so they are stripped.
    in_place = package.resolve().parent == ROOT / "python"
    default = ROOT / "build" / sys.prefix.strip(os.sep).replace(os.sep, "_") / "cmake"
    folder = Path(os.environ.get("FUSED_RMSNORM_BUILD_DIR") or default)
    configure = [
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTORCH_ROOT={';'.join(torch_roots())}",
        f"-DCMAKE_INSTALL_PREFIX={package.resolve()}",
        f"-DFUSED_RMSNORM_CUDA={os.environ.get('FUSED_RMSNORM_CUDA') or 'auto'}",
    ]
    if ninja and not (folder / "Makefile").exists():  # begun without: CMake cannot change over
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    for command in (
        configure,
        [cmake, "--build", str(folder), "--parallel", jobs],
        [cmake, "--install", str(folder), *([] if in_place else ["--strip"])],
    ):
        quiet = subprocess.DEVNULL if "--install" in command else None
        done = subprocess.run(command, stdout=quiet, check=False)
        if done.returncode:
            raise SystemExit(f"failed with exit status {done.returncode}: {' '.join(command)}")
    print((folder / "summary.txt").read_text().strip())
    for library in sorted((package / "lib").rglob("lib*.so")):
        size = library.stat().st_size / 1e6
        print(f"{library.relative_to(package)}: {size:.1f} MB", flush=True)


if __name__ == "__main__":
    build(ROOT / "python" / "fused_rmsnorm")
