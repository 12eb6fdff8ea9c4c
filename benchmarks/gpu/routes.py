"""Which kernels answer a call: ``python -m benchmarks.gpu.routes [--device cuda]``.

F.rms_norm goes to more than one kernel. On sm_90 and sm_100 torch (2.13 has it) hands it to a
kernel of quack's, written in CuTe DSL, where nvidia-cutlass-dsl is installed in a version that
torch knows; TORCH_DISABLE_NATIVE_JIT=1 keeps it in ATen. Liger has several back ends, chosen by
LIGER_KERNEL_IMPL. A time means little without the name of what ran, so this prints those names, as
JSON: for each norm the kernels of a forward and a backward, and the versions that decide.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ..norms.peers import present

__all__ = ["ROUTES", "kernels_of"]

# name -> the environment that chooses a route for F.rms_norm or a peer
ROUTES: dict[str, dict[str, str]] = {
    "as-installed": {},
    "torch-aten": {"TORCH_DISABLE_NATIVE_JIT": "1"},
    "liger-cutedsl": {"LIGER_KERNEL_IMPL": "cutedsl"},
    "liger-cutile": {"LIGER_KERNEL_IMPL": "cutile"},
}
DECIDING = ("nvidia-cutlass-dsl", "apache-tvm-ffi", "quack-kernels", "liger-kernel", "triton")


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def kernels_of(call: Callable[[], Any], device: str) -> list[str]:
    """Names of what a second call runs: kernels of a GPU; on a CPU, torch's operators."""
    call()  # compiles, and picks
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as ran:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    events = ran.events() or []
    if device == "cuda":
        names = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    else:
        names = [e.name for e in events if "::" in e.name]
    return list(dict.fromkeys(names))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, also where a norm raises: its line then holds the error."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.routes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args(argv).device
    rows, n, dtype = (4096, 4096, torch.bfloat16) if device == "cuda" else (4, 64, torch.float32)
    x = torch.randn(rows, n, device=device).to(dtype).requires_grad_()
    w = torch.ones(n, device=device, dtype=dtype, requires_grad=True)
    norms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "F.rms_norm": lambda x, w: torch.nn.functional.rms_norm(x, [n], w, 1e-6)
    }
    if device == "cuda":  # the peers have kernels for nothing else
        norms |= {name: norm for name, (peer, norm) in present("speed").items() if peer.backward}
    said: dict[str, Any] = {p: installed(p) for p in DECIDING}
    for name, norm in norms.items():

        def both(norm: Callable[[Tensor, Tensor], Tensor] = norm) -> None:
            y = norm(x, w)
            torch.autograd.grad(y, (x, w), torch.ones_like(y))

        try:
            said[name] = kernels_of(both, device)
        except Exception as error:  # whatever a peer raises: it is shown, not hidden
            said[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    print(json.dumps({"torch": torch.__version__, **said}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
