"""What the PTX ISA names: types, special registers, where threads meet; and how addresses are laid
out here."""

import re

import numpy as np

# Bits of a register or a memory operand of each type; 1 stands for a predicate.
WIDTH = {
    "pred": 1,
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32": 32, "f64": 64},
}
DTYPE: dict[str, type] = {
    "pred": np.bool_,
    **{"f16": np.float16, "f32": np.float32, "f64": np.float64},
    **{
        f"{kind}{bits}": getattr(np, f"{'int' if kind == 's' else 'uint'}{bits}")
        for kind in "bus"
        for bits in (8, 16, 32, 64)
    },
}
SPECIAL = re.compile(
    r"%(n?tid|n?ctaid|n?clusterid|cluster_n?ctaid|cluster_n?ctarank|laneid|n?warpid)(\.[xyz])?$"
)
# Where threads may have to wait for others.
MEETINGS = {"shfl", "bar", "barrier", "vote"}
NO_RESULT = {"st", "bra", "ret", "exit", "bar", "barrier", "cp", "griddepcontrol"}
ENDS = {"bra", "ret", "exit"}

# Addresses: .shared begins at SHARED_BASE, so that a null pointer is outside; the same bytes have a
# generic address from SHARED_WINDOW on. .global begins at GLOBAL_BASE.
SHARED_BASE = 1024
SHARED_WINDOW = 0x7E00_0000_0000
GLOBAL_BASE = 0x7F00_0000_0000


class Unsupported(Exception):
    """An instruction, or a form of one, that no kernel has needed so far."""


class Trap(Exception):
    """What a device would stop at, or what it would answer with garbage."""
