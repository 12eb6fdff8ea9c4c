"""Everything that needs a GPU, in one command: ``make gpu`` or ``python -m benchmarks.gpu``.

Stages, each with a time limit and each selectable, so that a run can be split:

build      for the GPU that is there
test       the whole test suite, which then runs on the GPU too
sanitize   compute-sanitizer (memcheck, racecheck, synccheck, initcheck) over every launch plan
bench      the grid against F.layer_norm, F.rms_norm, compiled F.rms_norm and the peers installed
paper      a training step of each of the paper's models with each norm

Works offline. Writes gpu.json (what ran, how it ended), norms.json, paper.json and their tables and
plots into --out.
With --cpu every stage runs on the CPU in a small form, to see that the command itself works.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .harness import RESULTS, environment, hardware_slug
from .peers import absent

ROOT = Path(__file__).parents[1]
STAGES = ("build", "test", "sanitize", "bench", "paper")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Rows short and long, aligned and not, registers, clusters and two passes.
PROBED = (8, 64, 100, 128, 1000, 1024, 4096, 4097, 16384, 40000, 131072, 300000)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--limit", type=float, default=540.0, help="seconds per command (default 540)")
    add("--seconds", type=float, default=0.5, help="per case of the benchmark")
    add("--out", type=Path, help="folder of the results")
    add("--cpu", action="store_true", help="a small run of every stage without a GPU")
    add("--probe", choices=("cpu", "cuda"), help="only: the kernels that sanitize looks at")
    return parser.parse_args(argv)


def commands(stage: str, cpu: bool, seconds: float, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and command line of each part of a stage."""
    python = sys.executable
    if stage == "build":
        yield "build", [python, "setup.py", "--quiet", "build_ext", "--inplace"]
    elif stage == "test":
        few = ["tests/test_forward.py", "-k", "test_empty or 0_rows"] if cpu else []
        yield "test", [python, "-m", "pytest", "-q", *few]
    elif stage == "sanitize":
        probe = [python, "-m", "benchmarks.gpu", "--probe", "cpu" if cpu else "cuda"]
        for tool in TOOLS if not cpu else ("none",):
            checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            yield f"sanitize/{tool}", probe if cpu else [*checker, *probe]
    elif stage == "paper":
        size = ["--seconds", "10"]
        if cpu:
            size = ["--seconds", "0", "--scale", "0.01", "--models", "dna_cnn", "--device", "cpu"]
        paper = [python, "-m", "benchmarks.paper", "--out", str(out)]
        yield "paper", [*paper, *size, "--only", "time", "properties"]
    elif cpu:
        small = ["--shapes", "4x64", "3x129", "--seconds", "0.02", "--no-compile"]
        yield "bench", [*_bench(python, out), *small, "--only", "speed", "latency"]
    else:
        limits = ["--gpu", "--seconds", str(seconds)]
        yield "bench", [*_bench(python, out), *limits, "--only", "speed", "latency"]


def _bench(python: str, out: Path) -> list[str]:
    return [python, "-m", "benchmarks.bench_norms", "--out", str(out)]


def run(command: list[str], limit: float) -> dict[str, Any]:
    """Exit status (None: over the limit), seconds, and the end of what was printed."""
    print("+", *command, flush=True)
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    start = time.perf_counter()
    rc: int | None
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit,
        )
        rc, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as over:
        rc, said = None, (over.stdout or b"").decode(errors="replace")
    except FileNotFoundError as missing:
        rc, said = 127, str(missing)
    print(said[-4000:], flush=True)
    seconds = round(time.perf_counter() - start, 1)
    return {"command": command, "rc": rc, "seconds": seconds, "output": said[-4000:]}


def probe(device: str) -> None:
    """Every family and dtype, forward and backward, small batches; raises if a value is wrong.

    The bound is four times F.rms_norm's own error against fp64, and two ulps.
    """
    import torch.nn.functional as F

    from fused_rmsnorm.functional import rms_norm

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for n in PROBED:
            rows = 3 if n > 20000 else 70
            x = torch.randn(rows, n, device=device, dtype=dtype, requires_grad=True)
            w = torch.randn(n, device=device, dtype=dtype, requires_grad=True)
            dy = torch.randn(rows, n, device=device, dtype=dtype)
            x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
            outcomes = []
            for leaves, norm, grad in (
                ((x64, w64), F.rms_norm, dy.double()),
                ((x, w), F.rms_norm, dy),
                ((x, w), rms_norm, dy),
            ):
                y = norm(leaves[0], (n,), leaves[1], 1e-6)
                outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
            for name, want, theirs, ours in zip(("y", "dx", "dw"), *outcomes, strict=True):
                size = want.abs().max()
                error, bound = ((v.double() - want).abs().max() / size for v in (ours, theirs))
                slack = 16 if dtype == torch.float64 else 1  # where the definition errs as much
                if not error <= 4 * bound + 2 * slack * torch.finfo(dtype).eps:
                    raise RuntimeError(f"{name} of {rows} x {n} {dtype}: {error:.2e}, {bound:.2e}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a stage failed, 2 without a GPU."""
    args = parse(argv)
    if args.probe:
        probe(args.probe)
        return 0
    if not args.cpu:
        wanting = [t for t in ("nvcc", "compute-sanitizer") if not shutil.which(t)]
        if not torch.cuda.is_available():
            print(f"no GPU: torch {torch.__version__} sees none. --cpu tries the command without.")
            return 2
        if wanting:
            print(f"not found, their stages will fail: {', '.join(wanting)}")
    out = (args.out or RESULTS / hardware_slug(environment())).resolve()
    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "mode": "cpu" if args.cpu else "gpu",
        "environment": environment(),
        "absent_peers": absent(),
        "parts": {},
    }
    if (out / "gpu.json").exists():  # of a run that was split
        before = json.loads((out / "gpu.json").read_text())
        if before["mode"] == summary["mode"]:
            summary["parts"] = before["parts"]
    for name, why in summary["absent_peers"].items():
        print(f"peer absent: {name} ({why})")
    for stage in args.stages:
        for name, command in commands(stage, args.cpu, args.seconds, out):
            summary["parts"][name] = run(command, args.limit)
            (out / "gpu.json").write_text(json.dumps(summary, indent=1) + "\n")
    ran = [n for stage in args.stages for n in summary["parts"] if n.split("/")[0] == stage]
    failed = [n for n in ran if summary["parts"][n]["rc"] != 0]
    for name, part in summary["parts"].items():
        end = "over the limit" if part["rc"] is None else f"exit {part['rc']}"
        print(f"{name}: {end}, {part['seconds']} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
