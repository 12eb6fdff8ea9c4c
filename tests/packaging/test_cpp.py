"""The C++ side as a user has it: find_package on what is installed, LibTorch, an AOTI package."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fused_rmsnorm

EXAMPLE = Path(__file__).parent / "example"
BUILD = EXAMPLE.parents[2] / "build" / "cpp-example"


def run(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def example() -> Path:
    """The example, built against the installed package by a compiler that knows nothing else."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(
        *("cmake", "-S", EXAMPLE, "-B", BUILD, *generator, "-DCMAKE_BUILD_TYPE=Release"),
        f"-DCMAKE_PREFIX_PATH={Path(fused_rmsnorm.__file__).parent}",
        f"-DTORCH_ROOT={Path(torch.__file__).parent}",
    )
    run("cmake", "--build", BUILD, "--parallel", os.cpu_count() or 1)
    return BUILD


def test_training_in_cpp(example: Path) -> None:
    run("ctest", "--test-dir", example, "--output-on-failure")


def test_aoti_package_runs_in_cpp(example: Path, tmp_path: Path) -> None:
    norm = fused_rmsnorm.RMSNorm(48, eps=1e-6)
    rows = torch.export.Dim("rows", max=1024)
    with torch.no_grad():
        exported = torch.export.export(norm, (torch.randn(3, 48),), dynamic_shapes={"x": {0: rows}})
    package = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "norm.pt2")
    )
    assert "package and library agree" in run(example / "run_package", package)


def test_another_torch_is_refused_by_find_package(tmp_path: Path) -> None:
    torch_root = tmp_path / "torch"
    torch_root.mkdir()
    (torch_root / "version.py").write_text("__version__ = '2.99.1+cpu'\n")
    done = subprocess.run(
        [
            *("cmake", "-S", EXAMPLE, "-B", tmp_path / "build", f"-DTORCH_ROOT={torch_root}"),
            f"-DCMAKE_PREFIX_PATH={Path(fused_rmsnorm.__file__).parent}",
        ],
        capture_output=True,
        text=True,
    )
    ours = ".".join(torch.__version__.split(".")[:2])
    said = " ".join(done.stderr.split())
    assert done.returncode
    assert f"is built for torch {ours}" in said
    assert "holds 2.99" in said
