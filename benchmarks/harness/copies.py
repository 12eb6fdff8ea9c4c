"""Copies to hold a memory-bound kernel against, beside torch.clone: memcpy and non-temporal stores.

Both write into memory that is there already and use as many of torch's threads as torch would.
torch.clone allocates, and copies with torch's own vector loop; glibc's memcpy writes past the
caches above a size that depends on the machine; the non-temporal copy always does. copies.cpp is
compiled at first use.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["COPIES", "copy_by"]

# name of the contender -> function of copies.cpp
COPIES = {"memcpy": "plain_copy", "nt_copy": "nt_copy"}

_SOURCE = Path(__file__).with_name("copies.cpp")


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    folder = Path(__file__).parents[2] / "build" / "benchmarks"
    name = f"copies-{hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not (folder / name).exists():
        folder.mkdir(parents=True, exist_ok=True)
        # libgomp.so.1 is the one that torch has loaded: its threads, not a second pool beside it.
        flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp"]
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / name
            done = subprocess.run([compiler, *flags, str(_SOURCE), "-o", str(made)], check=False)
            if done.returncode:
                return None
            os.replace(made, folder / name)
    return ctypes.CDLL(str(folder / name))


def copy_by(name: str) -> Callable[[tuple[Tensor, Tensor]], None] | None:
    """``copy((to, from))`` of contiguous CPU tensors, in torch.get_num_threads() threads.

    Args:
        name: "memcpy" or "nt_copy" (x86-64 only; ``to`` aligned to 16 bytes).

    Returns:
        None where it cannot be had: no compiler, another architecture.
    """
    function = getattr(_library(), COPIES[name], None)
    if function is None:
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = None

    def copy(pair: tuple[Tensor, Tensor]) -> None:
        to, source = pair
        bytes_ = source.numel() * source.element_size()
        function(to.data_ptr(), source.data_ptr(), bytes_, torch.get_num_threads())

    return copy
