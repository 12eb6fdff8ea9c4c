"""What kind of work an instruction of PTX is."""

from .parse import Instruction

_CLASS = {
    **{"ld": "load", "st": "store", "cp": "cp.async", "shfl": "shuffle", "vote": "shuffle"},
    **{"bar": "barrier", "barrier": "barrier", "bra": "branch", "ret": "branch", "exit": "branch"},
    **{"setp": "predicate", "selp": "select", "cvt": "convert", "mov": "move", "cvta": "move"},
    **{"griddepcontrol": "barrier", "div": "division", "rem": "division"},
    **{"rcp": "division", "sqrt": "division", "ex2": "exponential"},
}


def of(i: Instruction) -> str:
    """Its class: load.global, load.shared, store.global, store.shared, cp.async, shuffle, barrier,
    float, convert, integer, predicate, select, branch, division, exponential, move or param."""
    if i.opcode in ("ld", "st"):
        if "param" in i.modifiers:
            return "param"  # an operand of who uses it, from constant memory
        return f"{_CLASS[i.opcode]}.{'global' if 'global' in i.modifiers else 'shared'}"
    if i.opcode in _CLASS:
        return _CLASS[i.opcode]
    if i.type == "pred":
        return "predicate"
    return "float" if i.type.startswith("f") else "integer"
