"""The CUDA kernels' own sources, run on the CPU by the emulator in simt, plain and sanitized.

Each build runs all sections of simt/test_cuda_kernels.cpp, as many at once as there are cores;
slower builds run a share of the same cases. See simt/README.md.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

SIMT = Path(__file__).parent / "simt"
BUILDS = {  # -fsanitize=, and percent of the cases of a section
    "plain": ("", {"values": 100, "bits": 100, "general": 40, "special": 100}),
    "address": ("address,undefined", {"values": 25, "bits": 15, "general": 10, "special": 100}),
    "thread": ("thread", {"values": 6, "bits": 3, "general": 3, "special": 50}),
}
DTYPES = ("f32", "f64", "f16", "bf16")
SINGLE = ("gates", "errors")  # of f32 alone
SECTIONS = ("values", "bits", "general", "long", "special")  # the slow ones first


def headers() -> str | None:
    """Where cuda_fp16.h lies: beside nvcc, or in NVIDIA's wheels."""
    nvcc = shutil.which("nvcc")
    places = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    places += [Path(p) / "include" for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p]
    return next((str(p) for p in places if (p / "cuda_fp16.h").exists()), None)


def build(name: str, include: str) -> Path:
    folder = SIMT.parents[2] / "build" / f"simt-{name}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [f"-DSANITIZE={BUILDS[name][0]}", f"-DCUDA_INCLUDE={include}"]
    for command in (
        ["cmake", "-S", SIMT, "-B", folder, *generator, *options],
        ["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "test_cuda_kernels"


Run = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module", params=BUILDS)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    include = headers()
    if include is None:
        pytest.skip("the emulator needs NVIDIA's headers for half precision (cuda_fp16.h)")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator switches stacks with x86-64 instructions")
    program = build(request.param, include)
    pool = ThreadPoolExecutor(os.cpu_count())

    def start(section: str, dtype: str) -> "Future[subprocess.CompletedProcess[str]]":
        percent = str(BUILDS[request.param][1].get(section, 100))
        command = [str(program), section, dtype, percent]
        return pool.submit(subprocess.run, command, capture_output=True, text=True)

    started = {(s, d): start(s, d) for s in SECTIONS for d in DTYPES}
    started |= {(s, "f32"): start(s, "f32") for s in SINGLE}
    yield lambda section, dtype: started[section, dtype].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("section", SECTIONS)
def test_kernels(run: Run, section: str, dtype: str) -> None:
    done = run(section, dtype)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == f"{section} {dtype}: 0 failures\n"


@pytest.mark.parametrize("section", SINGLE)
def test_of_one_dtype(run: Run, section: str) -> None:
    done = run(section, "f32")
    assert done.returncode == 0, done.stderr[-5000:]
