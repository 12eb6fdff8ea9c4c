"""The GPUs of the model: what their makers publish, and what is assumed.

Published: NVIDIA's data sheets and architecture white papers (multiprocessors, clocks, memory),
and the CUDA C++ Programming Guide, "Technical specifications per compute capability" (threads,
blocks, registers and shared memory of a multiprocessor).

Assumed, and said so in every report:
- MEMORY_SHARE of the published memory bandwidth can be had. torch.clone on an H100 moves 3003 of
  3350 GB/s (quack's published benchmark), a copy on an H200 4.3 of 4.8 TB/s (measured): 0.896 both
  times.
- L2 serves L2_BYTES per clock and multiprocessor: 5.5 TB/s were measured on an H100 PCIe (114
  multiprocessors, 1755 MHz; Chips and Cheese, July 2023). Other GPUs are scaled from that one; but
  L2 is at least L2_OVER_MEMORY as fast as the memory behind it, as an H200's is by that scale. It
  is that which a B200 gets, of whose L2 no measurement was found.
- A read of memory takes LATENCY on a busy device. An idle H100 takes some 480 clocks (Luo et al.,
  arXiv 2402.13499), 0.27 us; queues under load add as much again and more.
"""

from typing import NamedTuple

__all__ = ["GPUS", "L2_BYTES", "LATENCY", "MEMORY_SHARE", "SCHEDULERS", "Gpu"]

MEMORY_SHARE = 0.896
L2_BYTES = 27.5
L2_OVER_MEMORY = 1.33
LATENCY = 0.8e-6  # seconds
SCHEDULERS = 4  # of a multiprocessor; each issues a warp instruction per clock


class Gpu(NamedTuple):
    name: str
    arch: int  # for the launch plan, and what ptxas compiles for
    virtual: int  # whose PTX it gets
    multiprocessors: int
    clock: float  # Hz, sustained
    bandwidth: float  # bytes/s of memory, as published
    threads: int  # resident in a multiprocessor
    ctas: int  # the same
    shared: int  # bytes of a multiprocessor

    @property
    def memory(self) -> float:
        """Bytes/s that a copy gets."""
        return MEMORY_SHARE * self.bandwidth

    @property
    def l2(self) -> float:
        """Bytes/s."""
        scaled = L2_BYTES * self.multiprocessors * self.clock
        return max(scaled, L2_OVER_MEMORY * self.bandwidth)


GPUS = (
    # A100 80 GB SXM: 1410 MHz boost, held under load.
    Gpu("A100", 80, 80, 108, 1.410e9, 2.039e12, 2048, 32, 164 << 10),
    # H100 SXM5: up to 1980 MHz; 1755 is what is held where memory is busy.
    Gpu("H100", 90, 90, 132, 1.755e9, 3.35e12, 2048, 32, 228 << 10),
    Gpu("H200", 90, 90, 132, 1.755e9, 4.8e12, 2048, 32, 228 << 10),
    # B200: up to 1965 MHz.
    Gpu("B200", 100, 90, 148, 1.755e9, 8.0e12, 2048, 32, 228 << 10),
    # RTX PRO 6000 Blackwell: boost 2617 MHz.
    Gpu("RTX PRO 6000", 120, 90, 188, 2.4e9, 1.792e12, 1536, 24, 100 << 10),
)
REGISTERS = 65536  # of a multiprocessor
RESERVED_SHARED = 1024  # bytes that the system takes of each block's


def resident(gpu: Gpu, cta_threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at once. Registers are given to warps in lots of 256."""
    per_warp = -(-registers * 32 // 256) * 256
    limits = (
        gpu.ctas,
        gpu.threads // cta_threads,
        REGISTERS // (per_warp * (cta_threads // 32)),
        gpu.shared // (shared + RESERVED_SHARED),
    )
    return min(limits)
