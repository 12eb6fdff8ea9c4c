"""Whether the CUDA half is built, and that it builds, links and loads where torch has no CUDA.

What nvcc makes of the kernels is read in test_cuda_ptx.py, and run by an emulator in
test_cuda_emulated.py; both compile what they need themselves.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_builds import objects

ROOT = Path(__file__).parents[2]
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def run(*command: object, **env: str) -> "subprocess.CompletedProcess[str]":
    settings = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
    return subprocess.run(
        [str(c) for c in command],
        env={**settings, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def configured(folder: Path, torch_cuda: str | None, setting: str, **env: str) -> str:
    """What CMake says of a torch that was built for this CUDA, or for none."""
    fake = folder / "torch"
    fake.mkdir()
    lines = ["__version__ = '2.13.0'", f"cuda: Optional[str] = {torch_cuda!r}"]
    (fake / "version.py").write_text("\n".join(lines) + "\n")
    done = run(
        *("cmake", "-S", ROOT, "-B", folder / "build", f"-DTORCH_ROOT={fake}"),
        *("-DFUSED_RMSNORM_PYTHON=OFF", f"-DFUSED_RMSNORM_CUDA={setting}"),
        **env,
    )
    return done.stdout + done.stderr


def test_auto_leaves_it_out_where_torch_has_no_cuda(tmp_path: Path) -> None:
    """And says so, and how to have it all the same."""
    said = configured(tmp_path, None, "auto")
    reason = "this torch has no CUDA (FUSED_RMSNORM_CUDA=1 builds it all the same)"
    assert f"CUDA backend: NO: {reason}" in said
    assert reason in (tmp_path / "build" / "summary.txt").read_text()


@needs_nvcc
@pytest.mark.parametrize(("torch_cuda", "setting"), [("13.0", "auto"), (None, "1")], ids=str)
def test_it_is_built(tmp_path: Path, torch_cuda: str | None, setting: str) -> None:
    assert "CUDA backend: yes (nvcc" in configured(tmp_path, torch_cuda, setting)


def test_forced_without_a_compiler_is_an_error(tmp_path: Path) -> None:
    said = configured(tmp_path, None, "1", CUDACXX=str(tmp_path / "no-nvcc"))
    assert "FUSED_RMSNORM_CUDA=1, but no CUDA compiler found" in " ".join(said.split())


LOADED = """
import torch, fused_rmsnorm
info = fused_rmsnorm.build_info()
assert info["cuda"] and info["cuda_reason"] is None, info
assert all(info[k] for k in ("cuda_version", "cub_version", "cuda_archs")), info
has = torch._C._dispatch_has_kernel_for_dispatch_key
assert has("fused_rmsnorm::rms_norm_fwd", "CUDA")
x = torch.randn(4, 64)
torch.testing.assert_close(fused_rmsnorm.RMSNorm(64)(x), torch.nn.RMSNorm(64)(x))
"""


@pytest.mark.slow
@needs_nvcc
def test_it_loads_beside_a_torch_without_cuda(tmp_path: Path) -> None:
    """Everything but speed: PTX of one architecture, nothing optimised. In a folder of its own,
    which stays, so that a second run compiles what has changed."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    package = tmp_path / "fused_rmsnorm"
    shutil.copytree(
        ROOT / "python" / "fused_rmsnorm",
        package,
        ignore=shutil.ignore_patterns("lib", "include", "share", "*.so", "__pycache__"),
    )
    folder = ROOT / "build" / "cuda-half"
    for command in (
        [
            *("cmake", "-S", ROOT, "-B", folder, *generator),
            *("-DFUSED_RMSNORM_CUDA=1", "-DCMAKE_CUDA_ARCHITECTURES=80-virtual"),
            *("-DCMAKE_CUDA_FLAGS=-Xcicc -O0", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={package}"),
            *(f"-DTORCH_ROOT={Path(torch.__file__).parent}", objects()),
        ],
        ["cmake", "--build", folder, "--parallel", os.cpu_count() or 1],
        ["cmake", "--install", folder],
    ):
        done = run(*command)
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    done = run(sys.executable, "-c", LOADED, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
