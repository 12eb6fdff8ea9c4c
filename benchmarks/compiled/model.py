"""How long a row takes on a GPU if one resource were the only limit. A model."""

from collections.abc import Mapping
from typing import Any

from .gpus import LATENCY, SCHEDULERS, Gpu, resident

__all__ = ["RESOURCES", "model"]

RESOURCES = ("memory", "L2", "L1", "issue", "latency")


def model(gpu: Gpu, counts: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Nanoseconds a row on the whole GPU.

    Args:
        counts: of count.count
        made: of count.machine, for this GPU
    """
    threads, shared = counts["threads of a block"], counts["shared bytes"]
    blocks = resident(gpu, threads, made["registers"], shared)
    clocks = gpu.multiprocessors * gpu.clock
    read, written = counts["bytes read"], counts["bytes written"]
    # Per 16-byte vector of x and warp -> a row.
    vectors = counts["vectors"]
    instructions = sum(made["instructions"].values()) * vectors / 32
    flight = counts["bytes in flight per thread"] * threads * blocks
    seconds = {
        "memory": (read + written) / gpu.memory,
        "L2": (counts["sectors stored"] + counts["sectors read once"]) * 32 / gpu.l2,
        "L1": (counts["sectors"] / 4 + counts["wavefronts"]) / clocks,
        "issue": instructions / (SCHEDULERS * clocks),
        # Little's law: what is asked for at once arrives once per latency.
        "latency": read * LATENCY / (flight * gpu.multiprocessors) if flight else 0.0,
    }
    binding = max(RESOURCES, key=lambda r: seconds[r])
    return {
        "ns": {r: round(seconds[r] * 1e9, 3) for r in RESOURCES},
        "binds": binding,
        "share of memory": round(seconds["memory"] / seconds[binding], 3),
        "blocks": blocks,
        "registers": made["registers"],
        "instructions": made["instructions"],
        "KB in flight": round(flight / 1024, 1),
    }
