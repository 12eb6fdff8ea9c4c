"""What a measurement depends on, as found: machine, software, settings. No host names, no paths."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["cache_bytes", "environment", "hardware_slug", "keep_freed_memory", "where_it_fits"]

# glibc: from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_allocator = "as the system set it"


def keep_freed_memory() -> str:
    """Makes glibc keep freed memory, for every contender alike; returns what was set.

    By default malloc maps large blocks anew and returns them at once, so every large output pays
    page faults: F.layer_norm of 4096 x 4096 fp32 took 26.8 ms instead of 7.7. A benchmark of
    kernels must not measure that.
    """
    global _allocator
    try:
        libc = ctypes.CDLL(None)
        settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
        done = all(libc.mallopt(key, value) == 1 for key, value in settings)
    except (AttributeError, OSError):
        done = False
    if done:
        _allocator = "glibc malloc, mmap_max=0, trim_threshold=-1 (never), arena_max=1, by mallopt"
    else:
        _allocator = "no mallopt here: freed memory may be returned and faulted in again"
    return _allocator


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _caches() -> dict[str, str]:
    """Data and unified caches that the first core sees, e.g. {"L1": "48K", "L2": "2048K"}."""
    caches: dict[str, str] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(str(index / f)) for f in ("level", "type", "size"))
        if kind != "Instruction" and level and size:
            caches[f"L{level}"] = size
    return caches


@functools.cache
def cache_bytes(device: str = "cpu") -> dict[str, int]:
    """Sizes of the data caches by name, smallest first; of a GPU its L2. Empty where unknown."""
    if device == "cuda":
        return {"L2": torch.cuda.get_device_properties(0).L2_cache_size}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return {k: int(s.rstrip("KMG")) * units.get(s[-1], 1) for k, s in sorted(_caches().items())}


def where_it_fits(bytes_: int, threads: int, device: str = "cpu") -> str:
    """Name of the smallest cache that holds ``bytes_``, or "memory"; "" where sizes are unknown.

    On a CPU each thread brings the caches of its core along; the last level counts once. Sizes are
    those that the system reports, which on a virtual machine may be shared with others.
    """
    sizes = cache_bytes(device)
    for name, size in sizes.items():
        shared = device == "cuda" or name == list(sizes)[-1]
        if bytes_ <= size * (1 if shared else threads):
            return name
    return "memory" if sizes else ""


def _cpu() -> dict[str, Any]:
    fields = dict(
        re.findall(
            r"^([^\t:]+?)\s*:\s*(.*)$", (_read("/proc/cpuinfo") or "").split("\n\n")[0], re.M
        )
    )
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": "-".join(
            fields.get(k, "?") for k in ("cpu family", "model", "stepping")
        ),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "caches": _caches(),
        "clock_mhz": fields.get("cpu MHz"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "aten_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    gpu: dict[str, Any] = {
        "model": p.name,
        "sm": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_bytes": p.total_memory,
        "l2_bytes": p.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
    }
    if smi := shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        out = subprocess.run(
            [smi, f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        gpu |= dict(zip(query.split(","), (s.strip() for s in out.split(",")), strict=False))
    return gpu


def _extension() -> dict[str, Any]:
    """Which build of the package is measured: build_info() and a digest of its libraries."""
    try:
        import fused_rmsnorm
    except Exception as e:
        return {"missing": f"{type(e).__name__}: {e}"}
    digest = hashlib.sha256()
    folder = Path(fused_rmsnorm.__file__).parent
    for library in sorted([*folder.rglob("*.so"), *folder.rglob("*.so.*"), *folder.glob("*.py")]):
        digest.update(library.read_bytes())
    return {**fused_rmsnorm.build_info(), "digest": digest.hexdigest()[:16]}


def environment() -> dict[str, Any]:
    """The report that stands at the head of every results file."""
    return {
        "cpu": _cpu(),
        "gpu": _gpu(),
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "allocator": _allocator,
        "preloaded": bool(os.environ.get("LD_PRELOAD")),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        "compiler_of_python": sys.version.split("[")[-1].rstrip("]"),
        "fused_rmsnorm": _extension(),
    }


def hardware_slug(env: dict[str, Any] | None = None) -> str:
    """Folder name of this hardware under benchmarks/results/, e.g. intel-xeon-2-cores-avx512."""
    env = env or {"cpu": _cpu(), "gpu": _gpu()}
    if env["gpu"]:
        text = env["gpu"]["model"]
    else:
        cpu = env["cpu"]
        text = f"{cpu['model']} {cpu['cores']} cores {cpu['aten_capability']}"
    text = re.sub(r"\((r|tm)\)|processor|cpu|@.*ghz", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")
