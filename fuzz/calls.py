"""What is called with what, as plain data: JSON goes into reports and comes back with --call.

A tensor is a dict with "shape"; a value that JSON does not know is {"special": name}. Everything
else is the value itself. What is drawn is a call as it should be, in which with some probability
one or two arguments are then spoiled; whether the result is still right is for rules.py to say.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from tests.support import cases

Spec = dict[str, Any]
REAL = ("float32", "float64", "float16", "bfloat16")
COMPLEX = ("complex64", "complex128")
OTHER = ("int64", "int8", "bool", "uint8", "float8_e4m3fn", "float8_e5m2", "complex32")
OPTIONS = ("eps", "p", "weight_offset", "casting_mode")


@dataclass(frozen=True)
class Target:
    """Something that can be called. `tensors` in the order of the schema."""

    family: str  # norm, add, gated, backward, gated_backward
    tensors: tuple[str, ...]
    shaped: bool = False  # takes normalized_shape and group_size
    kernel: bool = False  # takes what kernels take: real, weight and bias alike
    in_place: bool = False


NORM, ADD, GATED = (("input", *more, "weight", "bias") for more in ((), ("residual",), ("gate",)))
BACKWARD = ("grad_output", "input", "weight", "rstd", "grad_sum")
GATED_BACKWARD = ("grad_output", "input", "gate", "weight", "bias", "rstd")
TARGETS = {
    "functional.rms_norm": Target("norm", NORM, shaped=True),
    "functional.composite_rms_norm": Target("norm", NORM, shaped=True),
    "functional.add_rms_norm": Target("add", ADD, shaped=True),
    "functional.add_rms_norm_": Target("add", ADD, shaped=True, kernel=True, in_place=True),
    "functional.rms_norm_gated": Target("gated", GATED, shaped=True),
    "functional.composite_rms_norm_gated": Target("gated", GATED, shaped=True),
    "modules.RMSNorm": Target("norm", NORM, shaped=True),
    "modules.PRMSNorm": Target("norm", NORM, shaped=True),
    "modules.AddRMSNorm": Target("add", ADD, shaped=True),
    "modules.RMSNormGated": Target("gated", GATED, shaped=True),
    "ops.rms_norm": Target("norm", NORM),
    "ops.rms_norm_composite": Target("norm", NORM),
    "ops.rms_norm_fwd": Target("norm", NORM, kernel=True),
    "ops.add_rms_norm": Target("add", ADD),
    "ops.add_rms_norm_fwd": Target("add", ADD, kernel=True),
    "ops.add_rms_norm_": Target("add", ADD, kernel=True, in_place=True),
    "ops.rms_norm_gated": Target("gated", GATED),
    "ops.rms_norm_gated_composite": Target("gated", GATED),
    "ops.rms_norm_gated_fwd": Target("gated", GATED, kernel=True),
    "ops.rms_norm_bwd": Target("backward", BACKWARD, kernel=True),
    "ops.rms_norm_gated_bwd": Target("gated_backward", GATED_BACKWARD, kernel=True),
}

# What takes no tensors: others.py.
OTHERS = ("other.launch_plan", "other.replace_rms_norm_", "other.replace_layer_norm_")

LAYOUTS = ("contiguous", *cases.LAYOUTS)  # the first most often
# Tensors that are taken for what they hold, and those that are refused.
GOOD_KINDS = ("parameter", "subclass", "two", "negative", "zero", "inference", "dtensor")
BAD_KINDS = ("sparse", "csr", "mkldnn", "nested", "jagged", "quantised", "meta")

WAYS = (
    *("backward",) * 8,
    *("plain",) * 4,
    *("double backward", "jvp", "vmap", "vmap", "vmap of gradients", "functionalize", "make_fx"),
    *(
        "fake",
        "meta",
        "threads",
        "no_grad",
        "inference",
        "autocast",
        "rows",
        "changed",
        "one thread",
    ),
)
IN_PLACE_WAYS = ("no_grad", "no_grad", "inference", "plain", "threads", "fake", "functionalize")

# Beside what a number may be: all that people hand over for one.
NOT_NUMBERS = (True, "0.5", [0.5], [], {"special": "complex"}, {"special": "raises"})
NOT_NUMBERS += (
    {"special": "tensor with grad"},
    {"special": "tensor of one"},
    {"special": "huge int"},
)
NUMBERS = ({"special": "numpy"}, {"special": "fraction"}, {"special": "tensor"}, 1)
STRINGS = ("", "TORCH", "llama\0", {"special": "surrogate"}, {"special": "bytes"}, None, 3)
NOT_TENSORS = (None, 1.5, [1.0, 2.0], "tensor", {"special": "numpy array"}, {"special": "object"})


class Draw:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def of(self, choices: Any) -> Any:
        return self.random.choice(tuple(choices))

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def number(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def length(self) -> int:
        """Of a row: around vectors and blocks, and now and then long."""
        if self.chance(0.04):
            return self.of((1000, 2048, 4096, 4097, 8192, 8200))
        if self.chance(0.02):
            return 0
        if self.chance(0.5):
            return max(1, self.of((1, 2, 4, 8, 16, 32, 64, 128, 256)) + self.number(-1, 1))
        return self.number(1, 200)

    def leading(self, n: int) -> list[int]:
        if n > 900:
            return self.of(([], [1], [3], [17]))
        if self.chance(0.25):
            return [self.number(0, 40)]
        return self.of(([], [1], [2, 3], [0], [2, 0, 3], [5, 1], [3, 4], [2, 3, 2], [2, 1, 2, 3]))

    def seed(self) -> int:
        return self.number(0, 1 << 30)


def tensor(draw: Draw, shape: list[int], dtype: str, **more: Any) -> Spec:
    spec: Spec = {"shape": shape, "dtype": dtype, "seed": draw.seed()}
    spec["layout"] = draw.of(LAYOUTS) if draw.chance(0.5) else "contiguous"
    spec["grad"] = draw.chance(0.7) and (dtype in REAL or dtype in COMPLEX)
    if draw.chance(0.03):
        spec["fill"] = draw.of(("zero", "nan", "inf", "-inf", "tiny", "large"))
    if draw.chance(0.06):
        spec["kind"] = draw.of(GOOD_KINDS)
    return {**spec, **more}


def affine_shape(draw: Draw, leading: list[int], own: list[int]) -> list[int]:
    """Of a weight: mostly `own`, the shape that is normalised; else rows of it that broadcast."""
    if not leading or draw.chance(0.8):
        return own
    kept = leading[draw.number(0, len(leading)) :]
    return [size if draw.chance(0.6) else 1 for size in kept] + own


def options(draw: Draw, has_weight: bool) -> Spec:
    o: Spec = {
        "eps": draw.of((None, None, 1e-6, 1e-5, 0.5)),
        "p": draw.of((None, None, None, 0.0625, 0.07, 0.5, 1.0, draw.random.uniform(1e-6, 1))),
        "weight_offset": draw.of((0.0, 0.0, 1.0, -0.3)) if has_weight else 0.0,
        "casting_mode": draw.of(("torch", "torch", "llama")),
    }
    if draw.chance(0.02):
        o[draw.of(("eps", "p"))] = draw.of(NUMBERS)
    return o


def valid_call(draw: Draw, name: str) -> Spec:
    """What should give a result."""
    target = TARGETS[name]
    n = draw.length()
    leading = draw.leading(n)
    dtype = draw.of(REAL)
    may_be_complex = target.family in ("norm", "add") and not target.kernel
    if may_be_complex and draw.chance(0.03):
        dtype = draw.of(COMPLEX)
    own = [n]
    if target.shaped and draw.chance(0.2):
        parts = draw.number(1, 3)
        own = [draw.number(1, 6) for _ in range(parts)]
    shape = leading + own
    args: Spec = {"input": tensor(draw, shape, dtype)}
    for other in ("gate", "residual", "grad_output", "grad_sum"):
        if other in target.tensors:
            args[other] = tensor(draw, shape, dtype)
    if "residual" in args and dtype in ("float16", "bfloat16", "float32") and draw.chance(0.25):
        args["residual"]["dtype"] = draw.of(("float64",) if dtype == "float32" else ("float32",))
    if "gate" in args and draw.chance(0.2):
        args["gate"]["dtype"] = draw.of(REAL)
    if "grad_sum" in args and draw.chance(0.5):
        args["grad_sum"] = None
    affine_types = (dtype, dtype, "float32", *REAL, *(COMPLEX if dtype in COMPLEX else ()))
    rows = affine_shape(draw, leading, own)
    args["weight"] = tensor(draw, rows, draw.of(affine_types)) if draw.chance(0.8) else None
    if "bias" in target.tensors:
        args["bias"] = None
        if draw.chance(0.4):
            if target.kernel and args["weight"]:
                args["bias"] = {**args["weight"], "seed": draw.seed()}
            elif not target.kernel and (args["weight"] or not name.startswith("modules")):
                again = affine_shape(draw, leading, own)
                args["bias"] = tensor(draw, again, draw.of(affine_types))
    if "rstd" in target.tensors:
        wide = "float64" if dtype == "float64" else "float32"
        args["rstd"] = tensor(draw, [*shape[:-1], 1], wide, rstd=True, grad=False)
        size = 4 if "gate" in target.tensors else 3
        args["output_mask"] = [draw.chance(0.7) for _ in range(size)]
    args.update(options(draw, args["weight"] is not None))
    if target.family.startswith("gated"):
        args["activation"] = draw.of(("silu", "sigmoid"))
        args["norm_before_gate"] = draw.chance(0.5)
    if target.shaped:
        args["normalized_shape"] = own[0] if len(own) == 1 and draw.chance(0.6) else own
        total = 1
        for size in own:
            total *= size
        divisors = [d for d in range(1, min(total, 64) + 1) if total % d == 0] or [1]
        args["group_size"] = draw.of(divisors) if total and draw.chance(0.15) else None
    if name == "modules.PRMSNorm" and args["p"] is None:
        args["p"] = 0.25
    return {"target": name, "args": args}


def spoil(draw: Draw, call: Spec) -> None:
    """One argument made to be something else: mostly wrong, now and then only unusual."""
    target, args = TARGETS[call["target"]], call["args"]
    tensors = [n for n in target.tensors if isinstance(args.get(n), dict) and "shape" in args[n]]
    if not tensors:
        return
    what = draw.of(("shape", "shape", "dtype", "kind", "kind", "object", *["option"] * 4))
    if what == "option":
        name = draw.of([a for a in args if a not in target.tensors])
        args[name] = spoiled_option(draw, name)
        if args[name] == 1 << 31 and call["target"].startswith("modules."):
            args[name] = 1 << 62  # a weight of 8 GiB is no fault
        return
    name = draw.of(tensors)
    spec = args[name]
    if what == "object":
        args[name] = draw.of(NOT_TENSORS)
    elif what == "dtype":
        spec["dtype"] = draw.of((*OTHER, *COMPLEX, *REAL))
        spec["grad"] = spec.get("grad") and spec["dtype"] in REAL
    elif what == "kind":
        spec["kind"] = draw.of(BAD_KINDS)
    else:
        shape = list(spec["shape"])
        change = draw.number(0, 5)
        if change == 0 and shape:
            shape[-1] += draw.of((-1, 1, 7)) if shape[-1] else 1
        elif change == 1:
            shape = shape[1:]
        elif change == 2:
            shape = [draw.of((1, 2, 3)), *shape]
        elif change == 3 and len(shape) > 1:
            i = draw.number(0, len(shape) - 2)
            shape[i] += 1
        elif change == 4:
            shape = []
        else:
            spec["kind"] = "meta"  # where any size goes
            shape = [draw.of((2, 3, 1 << 31, 1 << 40)), *shape[1:-1], draw.of((1 << 33, 3, 0))]
        spec["shape"] = shape


def spoiled_option(draw: Draw, name: str) -> Any:
    inf = float("inf")
    if name in ("eps", "p", "weight_offset"):
        return draw.of((*NOT_NUMBERS, *NUMBERS, None, 0.0, -1.0, 1e300, inf, -inf, float("nan"), 2))
    if name in ("casting_mode", "activation"):
        return draw.of((*STRINGS, "llama", "sigmoid", "torch"))
    if name == "norm_before_gate":
        return draw.of((None, 1, "yes", [], 2.5))
    if name == "output_mask":
        return draw.of(([], [True], [True] * 5, None, [1, 0, 1], "TTT"))
    if name == "group_size":
        return draw.of((0, -1, 1, 2, 3, 1 << 63, 1 << 70, True, 2.0, "2", {"special": "numpy int"}))
    shapes = (0, -1, 8, 1 << 31, 1 << 63, 1 << 70, True, 2.0, "8", None, [], [[8]], [8, -1], [2.5])
    return draw.of(
        (*shapes, {"special": "numpy int"}, {"special": "object"}, {"special": "raises"})
    )


def overlap(draw: Draw, call: Spec) -> None:
    """Arguments of a call in place that lie in one buffer, with strides and offsets of any kind."""
    args = call["args"]
    n = draw.number(1, 8)
    shape = [draw.number(1, 3), draw.number(1, 4), n]
    strides = [draw.number(0, 40), draw.number(0, 20), draw.of((1, 1, 1, 0, 2))]
    for name in ("input", "residual", "weight", "bias"):
        spec = args.get(name)
        if not isinstance(spec, dict):
            continue
        spec.update(
            kind="view", grad=False, dtype=args["input"]["dtype"], offset=draw.number(0, 60)
        )
        if name in ("weight", "bias"):
            spec.update(shape=[n], strides=[1])
        else:
            other = [draw.number(0, 40), draw.number(0, 20), 1]
            spec.update(shape=shape, strides=other if draw.chance(0.3) else strides)
    if "normalized_shape" in args:
        args.update(normalized_shape=n, group_size=None)


def draw_other(draw: Draw) -> Spec:
    """Of launch_plan: any numbers and names. Of the swaps: a model, as a list of what it holds."""
    name = draw.of(OTHERS)
    if name == "other.launch_plan":
        sizes = (
            1,
            64,
            4096,
            1 << 20,
            1 << 48,
            (1 << 48) + 1,
            (1 << 63) - 1,
            1 << 70,
            0,
            -1,
            2.5,
            "8",
        )
        args = {
            "n": draw.of((*sizes, 2.5, "8"))
            if draw.chance(0.6)
            else draw.number(1, 1 << draw.number(1, 48)),
            "dtype": draw.of((*REAL, *REAL, "int8", "", 3, None)),
            "arch": draw.of((75, 80, 90, 90, 100, 120, 0, -1, 10**6, 1 << 40, "90")),
            "backward": draw.of((True, False, "yes")),
            "grad_dtype": draw.of((None, None, *REAL, "int8", 2)),
        }
    else:
        parts = ("rms", "rms64", "layer", "linear", "ours", "subclass", "hooked", "again", "odd")
        args = {
            "parts": [draw.of(parts) for _ in range(draw.number(0, 6))],
            "model": draw.of(("model",) * 8 + ("list", "none", "tensor", "norm")),
            "filter_fn": draw.of((None,) * 6 + ("none of them", "all", "raises", "number")),
        }
        if name.endswith("layer_norm_"):
            args["p"] = draw.of((None, None, 0.5, 1.0, 0.0, 2.0, float("nan"), "0.5", True))
    return {"target": name, "args": args, "way": "plain"}


def draw_call(seed: int) -> Spec:
    """The call of this seed: always the same one."""
    draw = Draw(seed)
    if draw.chance(0.04):
        return {**draw_other(draw), "seed": seed}
    name = draw.of(TARGETS)
    call = valid_call(draw, name)
    target = TARGETS[name]
    call["way"] = draw.of(IN_PLACE_WAYS if target.in_place else WAYS)
    call["seed"] = seed
    if target.in_place:
        for spec in call["args"].values():
            if isinstance(spec, dict) and "grad" in spec and draw.chance(0.9):
                spec["grad"] = False
        if draw.chance(0.3):
            overlap(draw, call)
            call["way"] = "no_grad"
            return call
    # A tensor of two wraps others: classes that do not know each other do not meet in one call.
    kinds = [
        s
        for s in call["args"].values()
        if isinstance(s, dict) and s.get("kind") in ("two", "subclass")
    ]
    for spec in kinds[0 if target.in_place else 1 :]:
        del spec["kind"]
    if draw.chance(0.35):
        for _ in range(draw.of((1, 1, 1, 2, 3))):
            spoil(draw, call)
        if call["way"] not in IN_PLACE_WAYS and call["way"] != "backward":
            call["way"] = draw.of(("plain", "no_grad", "inference", "fake", "threads"))
    return call
