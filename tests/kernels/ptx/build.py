"""What the tests of the compiled kernels are made of, each made once and kept in build/ptx.

A file's name holds a hash of the sources that it is made from, of the options and of the compiler:
a second run makes nothing, and a changed header makes what includes it. Processes that want the
same file wait for the first.
"""

import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]
SIMT = ROOT / "tests" / "kernels" / "simt"
FLAGS = ("-std=c++17", "-O3", "-fmad=false")  # as in CMakeLists.txt
# PTX is made for compute_80 (without clusters) and compute_90; ptxas compiles it for these.
TARGETS = {80: 80, 90: 90, 120: 90}
VIRTUALS = (80, 90)
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)


def why_not() -> str | None:
    """What is missing for PTX to be made, if anything is."""
    missing = [tool for tool in ("nvcc", "ptxas", "g++") if not shutil.which(tool)]
    return f"needs {' and '.join(missing)}" if missing else None


def run(*command: object) -> str:
    """What it says.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def closure(source: Path) -> list[Path]:
    """A source and what it includes by quotes, whatever #if stands round it."""
    found, todo = {source.resolve()}, [source]
    while todo:
        file = todo.pop()
        for name in _INCLUDE.findall(file.read_text()):
            included = (file.parent / name).resolve()
            if included.exists() and included not in found:
                found.add(included)
                todo.append(included)
    return sorted(found)


@functools.cache
def _version(tool: str) -> str:
    return run(tool, "--version")


def compiler() -> str:
    """nvcc and its version."""
    found = re.search(r"release [\d.]+, (V[\d.]+)", _version("nvcc"))
    return f"nvcc {found[1]}" if found else "nvcc"


def digest(files: Iterable[Path], *more: str) -> str:
    h = hashlib.sha256("\0".join(more).encode())
    for file in files:
        h.update(file.name.encode() + b"\0" + file.read_bytes())
    return h.hexdigest()[:16]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Nobody else makes `path` meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, made if it is not there: under another name first, so that it is whole or not
    there."""
    if not path.exists():
        with _alone(path):
            if not path.exists():
                part = path.with_name("part-" + path.name)
                make(part)
                part.rename(path)
    return path


class Build:
    """`source`: a checkout, of which csrc is read. `launch_code`: the one whose launch code is
    taken, where the source's is the same."""

    def __init__(
        self,
        source: Path = ROOT,
        work: Path = ROOT / "build" / "ptx",
        launch_code: Path | None = None,
    ):
        self.source, self.work = source, work
        self.launch_code = (launch_code or source) / "csrc"
        self.cuda = source / "csrc" / "cuda"
        self.units = sorted(p.stem for p in self.cuda.glob("*ward_*.cu"))
        self.stems: dict[Path, str] = {}

    def _stem(self, source: Path) -> str:
        if source not in self.stems:
            key = digest(closure(source), *FLAGS, _version("nvcc"))
            self.stems[source] = f"{source.stem}-{key}"
        return self.stems[source]

    def _path(self, source: Path, virtual: int) -> Path:
        return self.work / f"{self._stem(source)}-compute_{virtual}.ptx"

    def _ptx(self, source: Path, virtual: int) -> Path:
        path = self._path(source, virtual)
        command = ("nvcc", *FLAGS, f"-arch=compute_{virtual}", "-ptx", source, "-o")
        return made(path, lambda part: void(run(*command, part)))

    def ptx(self, unit: str, virtual: int) -> Path:
        """The PTX of csrc/cuda/`unit`.cu."""
        return self._ptx(self.cuda / f"{unit}.cu", virtual)

    def ptx_of_kernels(self, unit: str, virtual: int, kernels: Sequence[str]) -> Path:
        """PTX of some kernels of a unit, by their names in C++: seconds, most of
        which its headers take."""
        header = self.cuda / f"{unit.partition('_')[0]}.cuh"
        lines = [f'#include "{header.resolve()}"', *(f"template __global__ {k};" for k in kernels)]
        text = "\n".join([*lines, ""])
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        source = made(self.work / f"{name}.cu", lambda part: void(part.write_text(text)))
        return self._ptx(source, virtual)

    def has_all(self) -> bool:
        """Whether the PTX of every unit is there."""
        paths = (self._path(self.cuda / f"{u}.cu", v) for u in self.units for v in VIRTUALS)
        return all(path.exists() for path in paths)

    def keep(self, text: str, name: str) -> Path:
        """A file of its own for PTX that is a part of another's."""
        path = self.work / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.ptx"
        return made(path, lambda part: void(part.write_text(text)))

    def report(self, ptx: Path, target: int) -> str:
        """What ptxas says of a PTX file: registers, spills."""
        return self._machine_code(ptx, target).with_suffix(".txt").read_text()

    def cubin(self, ptx: Path, target: int) -> Path:
        """The machine code."""
        return self._machine_code(ptx, target)

    def release_report(self, unit: str, target: int) -> str:
        """The same of a unit, compiled for one architecture and no other."""
        source = self.cuda / f"{unit}.cu"
        path = self.work / f"{self._stem(source)}-release-sm_{target}.txt"

        def make(part: Path) -> None:
            flags = (*FLAGS, f"-arch=sm_{target}", "-cubin", "-Xptxas", "-v")
            part.write_text(run("nvcc", *flags, source, "-o", path.with_suffix(".cubin")))

        return made(path, make).read_text()

    def _machine_code(self, ptx: Path, target: int) -> Path:
        path = self.work / f"{ptx.stem}-sm_{target}.cubin"

        def make(part: Path) -> None:
            said = run("ptxas", "-v", f"-arch=sm_{target}", ptx, "-o", part)
            path.with_suffix(".txt").write_text(said)

        return made(path, make)

    def everything(self) -> None:
        """All PTX and all reports, and the host library, on all cores."""
        self.work.mkdir(parents=True, exist_ok=True)
        _forget_old(self.work)
        # The long ones first.
        jobs = sorted(
            ((u, v) for u in self.units for v in VIRTUALS),
            key=lambda job: ("backward" not in job[0], "f16" not in job[0]),
        )

        def make(job: tuple[str, int]) -> None:
            ptx = self.ptx(*job)
            for target, virtual in TARGETS.items():
                if virtual == job[1]:
                    self.cubin(ptx, target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            host = pool.submit(self.host_library)
            list(pool.map(make, jobs))
            host.result()

    def host_library(self) -> Path:
        """launches.cpp with the project's launch code and its emulator."""
        source = Path(__file__).with_name("launches.cpp")
        nvcc = shutil.which("nvcc")
        include = Path(nvcc).resolve().parents[1] / "include" if nvcc else Path()
        if not (include / "cuda_fp16.h").exists():
            include = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
        files = [*(self.launch_code / "cuda").iterdir(), self.launch_code / "norm.h", source]
        files += [*SIMT.glob("simt.*")]
        path = self.work / f"launches-{digest(sorted(files), _version('g++'))}.so"
        # As tests/kernels/simt/CMakeLists.txt.
        flags = ("-std=c++20", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
        folders = ("-I", self.launch_code, "-I", SIMT, "-isystem", include)
        command = ("g++", *flags, "-shared", "-fPIC", *folders, source, SIMT / "simt.cpp", "-o")
        return made(path, lambda part: void(run(*command, part)))


def void(_: object) -> None:
    """For calls that are made for what they do."""


def _forget_old(folder: Path, days: float = 7) -> None:
    """Files of sources that are long gone."""
    files = [p for p in folder.iterdir() if p.is_file()]
    newest = max((p.stat().st_mtime for p in files), default=0.0)
    for p in files:
        if p.stat().st_mtime < newest - days * 24 * 3600:
            p.unlink(missing_ok=True)
