"""The data of a call made into tensors and numbers. What torch itself cannot make is Impossible."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from tests.support.cases import lay_out

from .calls import TARGETS, Spec
from .rules import is_tensor


class Impossible(Exception):
    """Torch refuses to make this argument, so that nobody can pass it."""


class Subclass(Tensor):
    """As people write them: nothing overridden."""


class Raises:
    """A number, a length, a truth: each raises."""

    def __float__(self) -> float:
        raise ArithmeticError("no number")

    __index__ = __int__ = __len__ = __bool__ = __iter__ = __float__  # type: ignore[assignment]

    def __repr__(self) -> str:
        return "Raises()"


def special(name: str) -> Any:
    return {
        "complex": lambda: 1j,
        "raises": Raises,
        "tensor with grad": lambda: torch.tensor(0.5, requires_grad=True),
        "tensor of one": lambda: torch.ones(1),
        "tensor": lambda: torch.tensor(0.5),
        "huge int": lambda: 10**400,
        "numpy": lambda: np.float32(0.5),
        "numpy int": lambda: np.int64(8),
        "numpy array": lambda: np.ones(8, dtype=np.float32),
        "fraction": lambda: Fraction(1, 2),
        "surrogate": lambda: "\ud800",
        "bytes": lambda: b"llama",
        "object": object,
    }[name]()


def values(spec: Spec) -> Tensor:
    """The numbers, in fp64 (or complex128)."""
    generator = torch.Generator().manual_seed(spec["seed"])
    dtype = torch.complex128 if spec["dtype"].startswith("complex") else torch.float64
    t = torch.randn(spec["shape"], generator=generator, dtype=dtype)
    fill = spec.get("fill")
    if spec.get("rstd"):
        return t.abs() + 0.5
    if fill == "zero":
        return t.zero_()
    if fill in ("tiny", "large"):
        return t * (1e-4 if fill == "tiny" else 1e4)
    if fill and t.numel():
        t.view(-1)[spec["seed"] % t.numel()] = float(fill)
    return t


def of_kind(t: Tensor, kind: str | None) -> Tensor:
    if kind == "parameter":
        return torch.nn.Parameter(t, requires_grad=t.requires_grad)
    if kind == "subclass":
        return t.as_subclass(Subclass)
    if kind == "two":
        return TwoTensor(t, t.clone())
    if kind == "negative":
        return torch._neg_view(t.neg())
    if kind == "zero":
        return torch._efficientzerotensor(t.shape, dtype=t.dtype)
    if kind == "sparse":
        return t.to_sparse()
    if kind == "csr":
        return t.to_sparse_csr()
    if kind == "mkldnn":
        return t.to_mkldnn()
    if kind == "nested":
        return torch.nested.nested_tensor([t, t])
    if kind == "jagged":
        return torch.nested.nested_tensor([t, t], layout=torch.jagged)
    if kind == "quantised":
        return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8)
    return t


def make(spec: Spec, buffer: Tensor) -> Tensor:
    kind = spec.get("kind")
    dtype = getattr(torch, spec["dtype"])
    if kind == "meta":
        return torch.empty(spec["shape"], dtype=dtype, device="meta")
    if kind == "view":
        return buffer.as_strided(spec["shape"], spec["strides"], spec["offset"])
    if kind == "inference":
        with torch.inference_mode():
            return lay_out(values(spec).to(dtype), spec["layout"])
    t = values(spec).to(dtype)
    if t.dim() and spec["layout"] != "contiguous":
        if dtype in (torch.float8_e4m3fn, torch.float8_e5m2) or not t.dtype.is_floating_point:
            t = t.contiguous()
        else:
            t = lay_out(t, spec["layout"])
    t = of_kind(t, kind)
    if spec.get("grad"):
        t = t.detach().requires_grad_()
    return t


def materialise(call: Spec) -> dict[str, Any]:
    """The arguments by name.

    Raises:
        Impossible: torch has no such tensor.
    """
    buffer = torch.randn(
        600, generator=torch.Generator().manual_seed(call["seed"]), dtype=torch.float64
    )
    tensors = TARGETS[call["target"]].tensors
    kinds = {value.get("kind") for value in call["args"].values() if is_tensor(value)}
    for value in call["args"].values():
        if is_tensor(value) and value.get("kind") == "csr" and max(value["shape"], default=0) > 1e6:
            raise Impossible("its index alone takes more memory than there is")
    if kinds >= {"jagged", "two"}:
        raise Impossible("torch has no jagged tensor whose values are two tensors")
    args: dict[str, Any] = {}
    if is_tensor(call["args"].get("input")):
        dtype = getattr(torch, call["args"]["input"]["dtype"])
        if dtype.is_floating_point:
            buffer = buffer.to(dtype)
    for name, value in call["args"].items():
        if isinstance(value, dict) and "special" in value:
            args[name] = special(value["special"])
        elif is_tensor(value) and name in tensors:
            try:
                args[name] = make(value, buffer)
            except Exception as error:
                raise Impossible(f"{name}: {error}") from error
        else:
            args[name] = copy.deepcopy(value)
    return args


def plain(t: Any) -> Any:
    """What a tensor holds, as an ordinary one without history; anything else as it is."""
    if not isinstance(t, Tensor):
        return t
    if isinstance(t, TwoTensor):
        return plain(t.a)
    if t.is_inference():
        t = t.clone()
    t = t.detach()
    if type(t) is not Tensor:
        t = t.as_subclass(Tensor)
    if t.layout is not torch.strided or t.is_nested or t.is_quantized or t.is_meta:
        return t
    return (t + 0 if t._is_zerotensor() else t).resolve_conj().resolve_neg()
