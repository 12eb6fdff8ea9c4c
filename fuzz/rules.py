"""What the documentation says of a call, from its data alone: neither torch nor this
package decides.

`judge(call)` names the arguments that are at fault: the call must raise, and name one of them. With
none at fault it must give the right result, if `sure`; else it may also raise (a tensor of
inference mode in a graph, rows that interleave in memory), by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .calls import COMPLEX, REAL, TARGETS, Spec

WIDTH = {"float16": 1, "bfloat16": 1, "float32": 2, "float64": 3}
NO_LAYOUT = ("sparse", "csr", "mkldnn", "nested", "jagged")


@dataclass
class Verdict:
    faults: set[str] = field(default_factory=set)
    sure: bool = True


def is_tensor(value: Any) -> bool:
    return isinstance(value, dict) and "shape" in value


def is_wider(residual: str, input: str) -> bool:
    """Whether promotion of the two gives the residual's dtype."""
    return residual == input or WIDTH[residual] > WIDTH[input]


def as_shape(value: Any) -> list[int] | None:
    """normalized_shape as a list, None where it is no shape."""
    if isinstance(value, dict):
        return [8] if value == {"special": "numpy int"} else None
    members = value if isinstance(value, list) else [value]
    if any(isinstance(m, bool) or not isinstance(m, int) for m in members):
        return None
    return list(members) or None


def numbers(call: Spec, verdict: Verdict) -> None:
    args, raw = call["args"], call["target"].startswith("ops.")
    for name in ("eps", "p", "weight_offset"):
        value = args[name]
        if value is None:
            if name == "weight_offset":
                verdict.faults.add(name)
            continue
        plain = isinstance(value, (int, float)) and not isinstance(value, bool)
        taken = plain or value in ({"special": k} for k in ("numpy", "fraction", "tensor"))
        if not plain and raw:  # torch reads the arguments of operators
            verdict.sure = False
            continue
        if not taken:
            verdict.faults.add(name)
            continue
        if value == {"special": "tensor"} and call["way"] not in ("plain", "no_grad", "backward"):
            verdict.sure = False  # a number only where tensors are what they seem
        number = value if plain else 0.5
        if name == "p" and not 0 < number <= 1:
            verdict.faults.add(name)
        if name == "weight_offset":
            module = call["target"].startswith("modules.")  # where the weight starts at 1 - offset
            if not math.isfinite(number) or (module and abs(number) > 1e38):
                verdict.faults.add(name)
            elif number != 0 and args["weight"] is None:
                verdict.faults |= {name, "weight"}


def options(call: Spec, verdict: Verdict) -> None:
    args = call["args"]
    numbers(call, verdict)
    for name, accepted in (
        ("casting_mode", ("torch", "llama")),
        ("activation", ("silu", "sigmoid")),
    ):
        if args.get(name, accepted[0]) not in accepted:
            verdict.faults.add(name)
            if isinstance(args[name], dict) and call["target"].startswith("ops."):
                verdict.sure = False  # torch takes bytes for a string
    if "activation" in args and not isinstance(args["norm_before_gate"], bool):
        if call["target"].startswith("functional."):
            verdict.faults.add("norm_before_gate")
        else:
            verdict.sure = False
    if "output_mask" in args:
        mask, size = args["output_mask"], 4 if "gate" in args else 3
        if not isinstance(mask, list) or len(mask) != size:
            verdict.faults.add("output_mask")
        elif not all(isinstance(m, bool) for m in mask):
            verdict.sure = False


def affine(args: Spec, name: str, own: list[int], verdict: Verdict) -> None:
    """Weight or bias: ends in what is normalised, and before it broadcasts to the input."""
    shape, input = args[name]["shape"], args["input"]["shape"]
    leading, expected = shape[: -len(own)], input[: -len(own)]
    fits = len(shape) >= len(own) and shape[-len(own) :] == own and len(leading) <= len(expected)
    pairs = zip(reversed(leading), reversed(expected), strict=False)
    if not fits or any(a not in (1, b) for a, b in pairs):
        verdict.faults.add(name)


def dtypes(call: Spec, verdict: Verdict) -> None:
    args, target = call["args"], TARGETS[call["target"]]
    input = args["input"]["dtype"]
    takes_complex = target.family in ("norm", "add") and not target.kernel and not target.in_place
    if input not in REAL and not (input in COMPLEX and takes_complex):
        verdict.faults.add("input")
    for name in target.tensors[1:] if target.tensors[0] == "input" else target.tensors:
        if not is_tensor(args.get(name)) or name == "input":
            continue
        dtype = args[name]["dtype"]
        if name == "residual":
            real = dtype in REAL and input in REAL
            if dtype != input and not (real and is_wider(dtype, input)):
                verdict.faults |= {"residual", "input"}
        elif name == "rstd":
            if dtype != ("float64" if input == "float64" else "float32"):
                verdict.faults.add("rstd")
        elif dtype not in REAL and not (dtype in COMPLEX and input in COMPLEX and takes_complex):
            verdict.faults.add(name)
    weight = args.get("weight")
    if target.in_place and is_tensor(weight) and args["casting_mode"] == "llama":
        both = {input, weight["dtype"]}
        if both <= set(REAL) and len(both) > 1 and not (WIDTH[input] > WIDTH[weight["dtype"]]):
            verdict.faults |= {"input", "weight"}


def shapes(call: Spec, verdict: Verdict) -> None:
    args, target = call["args"], TARGETS[call["target"]]
    input = args["input"]["shape"]
    own = input[-1:]
    if target.shaped:
        shape = as_shape(args["normalized_shape"])
        if shape is None or not shape:
            verdict.faults |= set(args)
            if isinstance(args["normalized_shape"], list):
                verdict.sure = False  # of [8.0] or [True] only the numbers count
            return
        if input[-len(shape) :] != shape or len(shape) > len(input):
            verdict.faults |= set(args)
            return
        own = shape
        size, total = args["group_size"], math.prod(own)
        if size is not None:
            known = 8 if size == {"special": "numpy int"} else size
            if not isinstance(known, int) or isinstance(known, bool):
                verdict.faults |= set(args)
                return
            if known < 1 or known >= 1 << 63 or total % known:
                verdict.faults |= set(args)
                return
    if not input:
        verdict.faults |= {"input", "normalized_shape"}
        return
    for name in target.tensors:
        if name == "input" or not is_tensor(args.get(name)):
            continue
        shape = args[name]["shape"]
        if name in ("weight", "bias"):
            affine(args, name, own, verdict)
        elif shape != ([*input[:-1], 1] if name == "rstd" else input):
            verdict.faults |= {name}
    weight, bias = args.get("weight"), args.get("bias")
    if call["target"].startswith("modules.") and bias is not None and weight is None:
        verdict.faults |= {"bias", "elementwise_affine"}
    same = all(
        is_tensor(weight) and is_tensor(bias) and weight[k] == bias[k] for k in ("shape", "dtype")
    )
    if target.kernel and is_tensor(bias) and not same:
        verdict.faults |= {"bias", "weight"}


def kinds(call: Spec, verdict: Verdict) -> None:
    args, target = call["args"], TARGETS[call["target"]]
    for name in target.tensors:
        value = args.get(name)
        if not is_tensor(value):
            continue
        kind = value.get("kind")
        nested_module = kind in ("nested", "jagged") and call["target"].startswith("modules.")
        if kind in NO_LAYOUT and not nested_module:
            verdict.faults.add(name)
            if kind == "jagged" and call["target"].startswith("ops."):
                verdict.sure = False  # a Python class that sees the operator first, and says so
        elif nested_module or kind == "inference":
            verdict.sure = False
        elif kind == "quantised":
            verdict.faults.add(name)
        elif (kind == "meta") != (args["input"].get("kind") == "meta"):
            verdict.faults |= {name, "input"}
        if target.in_place:
            written = name in ("input", "residual")
            if kind in ("zero", "negative", "two", "parameter", "subclass"):
                verdict.sure = False
            if (written and value["layout"] != "contiguous") or kind == "view":
                verdict.sure = False  # check.py looks at the memory


def places(spec: Spec) -> list[int]:
    """Where the elements of a view lie, in elements from the start of the buffer."""
    found = [spec["offset"]]
    for size, stride in zip(spec["shape"], spec["strides"], strict=True):
        found = [at + i * stride for at in found for i in range(size)]
    return found


def overlaps(args: Spec, verdict: Verdict) -> None:
    """Of arguments in one buffer: nothing that is written may be written or read elsewhere, too."""
    written = [place for name in ("input", "residual") for place in places(args[name])]
    shared = len(set(written)) < len(written)
    for name in ("weight", "bias"):
        if is_tensor(args.get(name)):
            shared = shared or bool(set(places(args[name])) & set(written))
    if shared:
        verdict.faults |= {"input", "residual", "weight", "bias", "memory"}


def judge(call: Spec) -> Verdict:
    args, target = call["args"], TARGETS[call["target"]]
    verdict = Verdict()
    options(call, verdict)
    optional = ("weight", "bias", "grad_sum")
    for name in target.tensors:
        value = args.get(name)
        if is_tensor(value) or (value is None and name in optional):
            continue
        if name == "gate" and value is None and call["target"] == "modules.RMSNormGated":
            verdict.sure = False  # the plain norm
            continue
        verdict.faults.add(name)
    if not is_tensor(args["input"]):
        if any(is_tensor(v) and v.get("kind") == "jagged" for v in args.values()):
            verdict.sure = False  # see kinds()
        verdict.faults |= set(args)  # what else is wrong with them cannot be said without it
        return verdict
    kinds(call, verdict)
    dtypes(call, verdict)
    shapes(call, verdict)
    grads = any(is_tensor(v) and v.get("grad") for v in args.values())
    if target.in_place:
        if grads and call["way"] == "plain":
            verdict.faults |= {"add_rms_norm", "derivative"}
        if not verdict.faults and args["input"].get("kind") == "view":
            overlaps(args, verdict)
    return verdict
