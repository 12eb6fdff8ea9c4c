"""What is built and run where: python release/matrix.py [CELL...] (make matrix).

Cells are compilers ("g++-12", "clang++-14", "g++-12+nvcc") and pairs of a Python and a torch
("3.12/2.13"). Without arguments all that this machine has are done. Each is a whole build, at the
least 2 minutes. A cell is built into a folder of its own and release/smoke.py is run on it,
where that Python has that torch. Results are kept in docs/matrix.json, one per cell, and shown in
docs/matrix.md; a cell that could not be tried says why.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torches

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "matrix.json"
COMPILERS = ["g++-11", "g++-12", "g++-13", "g++-14", "g++-16", "clang++"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
TORCHES = ["2.11", "2.12", "2.13", "2.14"]
Result = dict[str, str]


def find_compiler(name: str) -> str | None:
    """A compiler of this name, or for "clang++" the newest of any version."""
    if name != "clang++":
        return shutil.which(name)
    versions = (shutil.which(f"clang++-{n}") for n in range(30, 13, -1))
    return shutil.which(name) or next((path for path in versions if path), None)


def find_python(version: str) -> str | None:
    """An interpreter of this version that has its headers; this one if it fits."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    code = (
        "import os, sys, sysconfig; header = sysconfig.get_path('include') + '/Python.h'; "
        f"sys.exit('%d.%d' % sys.version_info[:2] != '{version}' or not os.path.exists(header))"
    )
    pyenv = Path.home().glob(f".pyenv/versions/{version}*/bin/python3")
    for path in (shutil.which(f"python{version}"), *sorted(map(str, pyenv))):
        if (
            path
            and subprocess.run([path, "-c", code], check=False, capture_output=True).returncode == 0
        ):
            return path
    return None


def attempt(command: list[str], **options: object) -> tuple[bool, str]:
    """Whether it went well, and the last line of what it said; of errors, where it did not."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    well = done.returncode == 0
    said = (done.stdout if well else done.stdout + done.stderr).strip().splitlines()
    return well, said[-1] if said else ""


def build_and_run(python: str, minor: str, cxx: str | None, cuda: bool) -> Result:
    """One cell: built for this Python and torch, and run where ``python`` has that torch."""
    has = attempt([python, "-c", "import torch; print(torch.__version__)"])
    runs = has[0] and has[1].startswith(minor + ".")
    code = "import torch; print(torch.__path__[0])"
    root = Path(attempt([python, "-c", code])[1]) if runs else None
    root = root or torches.root(minor, ROOT / "build" / "torches")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "fused_rmsnorm"
        ignore = shutil.ignore_patterns("lib", "include", "share", "*.so", "__pycache__")
        shutil.copytree(ROOT / "python" / "fused_rmsnorm", package, ignore=ignore)
        environment = {
            **os.environ,
            "FUSED_RMSNORM_BUILD_DIR": f"{folder}/cmake",
            "FUSED_RMSNORM_TORCHES": str(root),
            "FUSED_RMSNORM_CUDA": "1" if cuda else "0",
            "PYTHONPATH": folder,
            **({"CXX": cxx, "CUDAHOSTCXX": cxx} if cxx else {}),
        }
        build = f"import runpy, pathlib; b = runpy.run_path({str(ROOT / 'cmake' / 'build.py')!r}); "
        build += f"b['build'](pathlib.Path({str(package)!r}))"
        built, said = attempt([python, "-c", build], env=environment)
        if not built:
            return {"built": "NO", "run": "no", "note": said}
        if not runs:
            return {"built": "yes", "run": "no", "note": f"no torch {minor} here for this Python"}
        smoke = str(ROOT / "release" / "smoke.py")
        ran, said = attempt([python, smoke, minor], cwd=folder, env=environment)
        return {"built": "yes", "run": "yes" if ran else "NO", "note": said}


def compiler_cell(cell: str) -> Result:
    name, cuda = cell.removesuffix("+nvcc"), cell.endswith("+nvcc")
    cxx = find_compiler(name)
    if cxx is None:
        return {"built": "no", "run": "no", "note": "this compiler is not here"}
    if cuda and not shutil.which("nvcc"):
        return {"built": "no", "run": "no", "note": "nvcc is not here"}
    done, version = attempt([sys.executable, "-c", "import torch; print(torch.__version__)"])
    if not done:
        raise SystemExit(f"{sys.executable} has no torch")
    result = build_and_run(sys.executable, ".".join(version.split(".")[:2]), cxx, cuda)
    said = subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout
    return {**result, "compiler": said.splitlines()[0]}


def python_cell(cell: str) -> Result:
    version, minor = cell.split("/")
    python = find_python(version)
    if python is None:
        return {"built": "no", "run": "no", "note": f"Python {version} is not here"}
    return build_and_run(python, minor, None, cuda=False)


def render(results: dict[str, Result]) -> str:
    """docs/matrix.md: two tables and the reasons."""
    lines = [
        "# What was built and run where",
        "",
        "Written from `matrix.json` by `make matrix`, and by `make wheel` for one wheel under",
        "several versions of torch. *built* means the whole package, *run* `release/smoke.py`:",
        "forward and backward against fp64 in four dtypes, torch.compile, state dict. Where there",
        "is no GPU, *run* means the CPU half of a build that has both.",
        "",
        "## Python and torch, built by g++ without CUDA",
        "",
        "| | " + " | ".join(f"torch {t}" for t in TORCHES) + " |",
        "|---|" + "---|" * len(TORCHES),
    ]

    def state(cell: str) -> str:
        result = results.get(cell)
        if result is None:
            return "not tried"
        if result["built"] == "yes":
            return {"yes": "built, run", "no": "built", "NO": "built, FAILED"}[result["run"]]
        return "FAILED to build" if result["built"] == "NO" else "not here"

    for python in PYTHONS:
        cells = " | ".join(state(f"{python}/{minor}") for minor in TORCHES)
        lines.append(f"| Python {python} | {cells} |")
    lines += ["", "## Compilers", "", "| | without CUDA | with nvcc |", "|---|---|---|"]
    for name in COMPILERS:
        lines.append(f"| {name} | {state(name)} | {state(name + '+nvcc')} |")
    lines += ["", "## Notes", "", "| | when | what |", "|---|---|---|"]
    for cell, result in sorted(results.items()):
        text = "; ".join(result[k] for k in ("compiler", "note") if result.get(k))
        lines.append(f"| {cell} | {result['date']} | {text} |")
    return "\n".join(lines) + "\n"


def record(new: dict[str, Result]) -> None:
    """Results of cells, over what was known of them before."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    results.update({cell: {**result, "date": today} for cell, result in new.items()})
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    RESULTS.with_suffix(".md").write_text(render(results))


def main(cells: list[str]) -> None:
    everything = [name + nvcc for name in COMPILERS for nvcc in ("", "+nvcc")]
    everything += [f"{python}/{minor}" for python in PYTHONS for minor in TORCHES]
    unknown = set(cells) - set(everything)
    if unknown:
        raise SystemExit(f"no such cells: {sorted(unknown)}; there are {everything}")
    for cell in cells or everything:
        result = python_cell(cell) if "/" in cell else compiler_cell(cell)
        record({cell: result})
        print(f"{cell}: built {result['built']}, run {result['run']}: {result['note']}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("cells", nargs="*", metavar="CELL")
    main(parser.parse_args().cells)
