"""Copies to hold a memory-bound kernel against: torch.clone and one with non-temporal stores.

No torch call writes past the caches on a CPU (glibc's memcpy does above a size that depends on the
machine, and torch's copies do not use it), so nt_copy.cpp is compiled here at first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["nt_clone"]

_SOURCE = Path(__file__).with_name("nt_copy.cpp")


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        return None
    folder = Path(__file__).parents[1] / "build" / "benchmarks"
    name = f"nt_copy-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-pthread"]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / name
            done = subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(made)], check=False)
            if done.returncode:
                return None
            os.replace(made, folder / name)
    library = ctypes.CDLL(str(folder / name))
    library.nt_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def nt_clone() -> Callable[[Tensor], Tensor] | None:
    """``clone(x)`` of a contiguous CPU tensor by non-temporal stores, in torch.get_num_threads().

    None without a compiler or off x86-64.
    """
    library = _library()
    if library is None:
        return None

    def clone(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        bytes_ = x.numel() * x.element_size()
        library.nt_copy(y.data_ptr(), x.data_ptr(), bytes_, torch.get_num_threads())
        return y

    return clone
