"""Everything that needs a GPU, in one command: ``make gpu`` or ``python -m benchmarks.gpu``.

Stages, each with a time limit of nine minutes and each selectable, so that a run can be split. With
the first minutes on a GPU, "--stages build first" answers the most.

build      for the GPU that is there; a build without CUDA is a failure
first      450 cases of every family, dtype and direction against fp64; ten lines of bandwidth
test       the test suite, which then runs on the GPU too
host       the tests that look at the kernels without a GPU (emulator, PTX, C++)
sanitize   compute-sanitizer (memcheck, racecheck, synccheck, initcheck) over every launch plan
bench      the grid against F.layer_norm, F.rms_norm, compiled F.rms_norm and the peers installed;
           over its limit it keeps what it has, and the same command goes on from there
gated      gates, weights per head and per sample against the operations that people write
routes     F.rms_norm with and without torch's CuTe DSL kernels, Liger by each of its back ends, and
           the names of the kernels that ran: see benchmarks.gpu.routes
paper      a training step of each of the paper's models with each norm

--go-on leaves out what has already succeeded in --out. Works offline: a stage that lacks a program
or package says so and fails alone; --wheels FOLDER installs the wheels of the peers that were
carried there, for this run only. Writes gpu.json (what ran, how it ended), norms.json, paper.json
and their tables and plots into --out. With --cpu every stage runs on the CPU in a small form, to
see that the command itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..harness.environment import environment, hardware_slug
from ..norms.peers import absent
from .probe import FIRST, PROBED, probe
from .routes import ROUTES

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "python" / "fused_rmsnorm" / "lib" / "libfused_rmsnorm_kernels.so"
HOST_TESTS = (
    "tests/kernels/test_cuda_emulated.py",
    "tests/kernels/test_cuda_ptx.py",
    "tests/kernels/test_cpu_kernels.py",
    "tests/kernels/test_ptx_counts.py",
    "tests/kernels/test_ptx_faults.py",
    "tests/kernels/test_ptx_instructions.py",
    "tests/kernels/test_ptx_kernels.py",
    "tests/kernels/test_ptx_traps.py",
    "tests/benchmarks/test_compiled_model.py",
    "tests/packaging/test_cpp.py",
)
BUILT = """\
import json, sys, fused_rmsnorm
info = fused_rmsnorm.build_info()
print(json.dumps(info, indent=1))
sys.exit(sys.argv[1] == "cuda" and not info["cuda"] and "built without CUDA")
"""
STAGES = ("build", "first", "test", "host", "sanitize", "bench", "gated", "routes", "paper")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Rows of memory, and QK-norm; each forward, and forward and backward.
BANDWIDTH = ("32768x1024", "32768x4096", "8192x16384", "32768x4097", "648720x128")
ROUTED = ("32768x1024", "32768x4096", "8192x16384")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--limit", type=float, default=540.0, help="seconds per stage (default 540)")
    add("--go-on", action="store_true", help="leave out what has succeeded before")
    add("--wheels", type=Path, help="folder of wheels to install for this run")
    add("--seconds", type=float, default=0.5, help="per case of the benchmark")
    add("--tests", nargs="+", metavar="PATH", help="for the stage test, instead of the whole suite")
    add("--grid", nargs="+", metavar="GRID", help="for the stage bench: see benchmarks.norms")
    add("--out", type=Path, help="folder of the results")
    add("--cpu", action="store_true", help="a small run of every stage without a GPU")
    add("--probe", choices=("cpu", "cuda"), help="only: the kernels that sanitize looks at")
    add("--lengths", choices=("probed", "first"), default="probed", help="with --probe: of rows")
    return parser.parse_args(argv)


def commands(stage: str, args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Name and command line of each part of a stage."""
    python, device = sys.executable, "cpu" if args.cpu else "cuda"
    if stage == "build":
        yield "build/compile", [python, "cmake/build.py"]
        yield "build/check", [python, "-c", BUILT, device]
    elif stage == "first":
        probe = [python, "-m", "benchmarks.gpu", "--probe", device, "--lengths", "first"]
        yield "first/check", probe
        yield "first/bandwidth", bench_of(BANDWIDTH, args, "first")
    elif stage == "routes":
        for name in list(ROUTES)[: 2 if args.cpu else None]:
            routes = [python, "-m", "benchmarks.gpu.routes", "--device", device]
            yield f"routes/{name}/kernels", routes
            yield f"routes/{name}/bench", bench_of(ROUTED, args, f"routes/{name}")
    elif stage in ("test", "host"):
        pytest = [python, "-m", "pytest", "-rs"]
        if find_spec("xdist"):
            pytest += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "loadfile"]
        if stage == "host":
            small = ["tests/contracts/test_registration.py"]
            yield "host", [*pytest, *(small if args.cpu else HOST_TESTS)]
        elif args.tests or args.cpu:
            yield "test/chosen", [*pytest, *(args.tests or ["tests/kernels/test_launch_plan.py"])]
        else:
            yield "test/gpu", [*pytest, *(f"--ignore={path}" for path in HOST_TESTS)]
    elif stage == "sanitize":
        probe = [python, "-m", "benchmarks.gpu", "--probe", device]
        for tool in TOOLS if not args.cpu else ("none",):
            checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            yield f"sanitize/{tool}", probe if args.cpu else [*checker, *probe]
    elif stage == "gated":
        size = ["--seconds", "4"]
        if args.cpu:
            size = ["--seconds", "0.02", "--tokens", "8", "--cases", "heads", "--dtypes", "float32"]
        yield "gated", [python, "-m", "benchmarks.gated", "--out", str(args.out), *size]
    elif stage == "paper":
        size = ["--seconds", "10"]
        if args.cpu:
            size = ["--seconds", "0", "--models", "dna_cnn", "--device", "cpu"]
        paper = [python, "-m", "benchmarks.paper", "--out", str(args.out)]
        yield "paper", [*paper, *size, "--only", "time", "properties"]
    else:
        bench = [python, "-m", "benchmarks.norms", "--out", str(args.out)]
        grid = ["--gpu", "--seconds", str(args.seconds)]
        if args.grid:
            grid += ["--grid", *args.grid]
        small = ["--shapes", "4x64", "3x129", "--seconds", "0.02", "--no-compile"]
        yield "bench", [*bench, *(small if args.cpu else grid), "--only", "speed", "add", "latency"]


def bench_of(shapes: Sequence[str], args: argparse.Namespace, folder: str) -> list[str]:
    """A few shapes in bf16, uncompiled: half a minute, into a folder of its own."""
    shapes = ("4x64", "3x129") if args.cpu else shapes
    return [
        *(sys.executable, "-m", "benchmarks.norms", "--out", str(args.out / folder)),
        *("--only", "speed", "--no-compile", "--dtypes", "bfloat16", "--shapes", *shapes),
        *("--seconds", "0.02" if args.cpu else "0.5"),
    ]


def surroundings(part: str, cpu: bool) -> dict[str, str]:
    """The environment of a part. CUDA's programs are found where its installer puts them."""
    path = [str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
    if part.startswith("routes/"):
        env |= ROUTES[part.split("/")[1]]
    toolkit = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"
    env["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(toolkit)])
    if not cpu:
        env["FUSED_RMSNORM_CUDA"] = "1"
    if part.startswith(
        "sanitize/"
    ):  # each tensor an allocation of its own, whose bounds are watched
        env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return env


def run(command: list[str], limit: float, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Exit status (None: over the limit), seconds, and the end of what was printed."""
    print("+", *command, flush=True)
    start = time.perf_counter()
    rc: int | None
    program = shutil.which(command[0], path=(env or os.environ).get("PATH")) or command[0]
    try:
        process = subprocess.Popen(
            [program, *command[1:]],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError as missing:
        rc, said = 127, str(missing)
    else:
        try:
            said = process.communicate(timeout=limit)[0]
            rc = process.returncode
        except subprocess.TimeoutExpired:  # ends with all that it started
            os.killpg(process.pid, signal.SIGKILL)
            said, rc = process.communicate()[0], None
    print(said[-4000:], flush=True)
    seconds = round(time.perf_counter() - start, 1)
    return {"command": command, "rc": rc, "seconds": seconds, "output": said[-4000:]}


def install(wheels: Path, folder: Path) -> int:
    """Puts every wheel of ``wheels`` where all parts of this run find it; without a network."""
    found = sorted(str(p) for p in wheels.glob("*.whl"))
    if not found:
        print(f"no wheels in {wheels}")
        return 1
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    rc = run([*pip, "--upgrade", "--target", str(folder), *found], 300)["rc"]
    sys.path.insert(0, str(folder))
    paths = [str(folder), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
    return 1 if rc is None else rc


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a stage failed, 2 without a GPU."""
    args = parse(argv)
    if args.probe:
        probe(args.probe, FIRST if args.lengths == "first" else PROBED)
        return 0
    if not args.cpu and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none. --cpu tries the command without.")
        return 2
    if "build" not in args.stages and not LIBRARY.exists():
        print('not built: run the stage build first (GPU_ARGS="--stages build ...")')
        return 2
    out = args.out = (args.out or ROOT / "benchmarks" / "results" / hardware_slug()).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.wheels and install(args.wheels, ROOT / "build" / "peers"):
        return 2
    summary: dict[str, Any] = {
        "mode": "cpu" if args.cpu else "gpu",
        "environment": None,
        "absent_peers": absent(),
        "parts": {},
    }
    if (out / "gpu.json").exists():  # of a run that was split
        before = json.loads((out / "gpu.json").read_text())
        if before["mode"] == summary["mode"]:
            summary |= {key: before[key] for key in ("environment", "parts")}
    for name, why in summary["absent_peers"].items():
        print(f"peer absent: {name} ({why})")
    ran: list[str] = []
    for stage in sorted(set(args.stages), key=STAGES.index):
        if stage != "build":  # a build is not to replace a library that is loaded here
            summary["environment"] = environment()
        end = time.monotonic() + args.limit
        for name, command in commands(stage, args):
            ran.append(name)
            if args.go_on and summary["parts"].get(name, {}).get("rc") == 0:
                continue
            left = max(0.1, end - time.monotonic())
            summary["parts"][name] = run(command, left, surroundings(name, args.cpu))
            (out / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
        partial = out / "norms.partial.json"
        if stage == "bench" and partial.exists():  # readable as far as it got
            report = [sys.executable, "-m", "benchmarks.norms.report", str(partial)]
            run(report, args.limit, surroundings("report", args.cpu))
    failed = [n for n in ran if summary["parts"][n]["rc"] != 0]
    for name, part in summary["parts"].items():
        end = "over the limit" if part["rc"] is None else f"exit {part['rc']}"
        print(f"{name}: {end}, {part['seconds']} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
