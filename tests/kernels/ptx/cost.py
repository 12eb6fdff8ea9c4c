"""How many machine instructions ptxas makes of an instruction of PTX, by class: an estimate.

Calibrated by the sizes of compiled kernels (docs/compiled.md): address arithmetic in 64 bits takes
two instructions, moves and widening none, a division of 64 bits a call.
"""

from .parse import Instruction

_CLASS = {
    **{"ld": "load", "st": "store", "cp": "cp.async", "shfl": "shuffle", "vote": "shuffle"},
    **{"bar": "barrier", "barrier": "barrier", "bra": "branch", "ret": "branch", "exit": "branch"},
    **{"setp": "predicate", "selp": "select", "cvt": "convert", "mov": "move", "cvta": "move"},
    **{"mapa": "integer", "griddepcontrol": "barrier"},
}
CLASSES = (
    *(
        "load.global",
        "load.shared",
        "store.global",
        "store.shared",
        "cp.async",
        "shuffle",
        "barrier",
    ),
    *("float", "convert", "integer", "predicate", "select", "branch", "division", "move"),
)


def of(i: Instruction) -> tuple[str, float]:
    """Its class, and the machine instructions."""
    wide = 2.0 if i.type in ("s64", "u64", "b64") else 1.0
    kind = _CLASS.get(i.opcode, "")
    if i.opcode in ("ld", "st"):
        if "param" in i.modifiers:
            return "param", 0.0  # an operand of who uses it, from constant memory
        return f"{kind}.{'global' if 'global' in i.modifiers else 'shared'}", 1.0
    if kind == "move":
        return kind, 1.0 if any(isinstance(x, tuple) for x in i.operands) else 0.0
    if i.opcode == "cvt":
        types = set(i.modifiers)
        return kind, 0.0 if {"u64", "u32"} <= types or {"s64", "u32"} <= types else 1.0
    if kind:
        return kind, wide if i.opcode in ("setp", "selp") else 1.0
    if i.type == "pred":
        return "predicate", 1.0
    if i.opcode in ("div", "rcp", "sqrt", "rem"):  # of 64 bits: a call of what the kernel has once
        single = 20.0 if i.type in ("f64", "u32", "s32") else 9.0
        return "division", 10.0 if wide == 2 else single
    if i.type.startswith("f"):
        return "float", 1.0
    if i.opcode in ("mul", "mad") and wide == 2 and "lo" in i.modifiers:
        return "integer", 4.0
    return "integer", wide


def by_class(instructions: list[Instruction]) -> dict[str, tuple[int, float]]:
    """Class -> (instructions of PTX, machine instructions)."""
    costs: dict[str, tuple[int, float]] = {}
    for i in instructions:
        kind, estimate = of(i)
        number, total = costs.get(kind, (0, 0.0))
        costs[kind] = number + 1, total + estimate
    return costs
