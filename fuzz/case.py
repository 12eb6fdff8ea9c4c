"""A call as a function of its tensors, and what it raises told apart from what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fused_rmsnorm
from fused_rmsnorm import functional
from tests.support.reference import same_bits

from . import oracle
from .arguments import plain
from .calls import TARGETS, Spec

# Torch's own words for what it refuses before a kernel is asked.
TORCHS_OWN = re.compile(
    r"allocate memory|Storage size calculation overflowed|invalid size"
    r"|numel: integer multiplication|We only support functionalizing|fixed-size array"
    r"|Could not run 'fused_rmsnorm::\w+_(fwd|bwd|)'"
    r"|[Ii]nference tensor|in-?place update to (an )?inference|single memory location"
    r"|Attempted to set the storage of a tensor on device"  # a zero tensor beside a wrapper
)


class Raised(Exception):
    """What a call raised, as its cause."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


def invoke(target: str, args: dict[str, Any]) -> tuple[Any, ...]:
    kind, name = target.split(".")
    if kind == "modules":
        result = invoke_module(getattr(fused_rmsnorm, name), target, args)
    else:
        where = functional if kind == "functional" else torch.ops.fused_rmsnorm
        result = getattr(where, name)(**args)
    return result if isinstance(result, tuple) else (result,)


def invoke_module(cls: type[nn.Module], target: str, args: dict[str, Any]) -> Any:
    affine = ("weight", "bias")
    options = {k: v for k, v in args.items() if k not in TARGETS[target].tensors}
    module = cls(
        elementwise_affine=args["weight"] is not None, bias=args["bias"] is not None, **options
    )
    given = {k: args[k] for k in affine if args[k] is not None}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            setattr(module, name, value)
    inputs = tuple(args[k] for k in TARGETS[target].tensors if k not in affine)
    return torch.func.functional_call(module, given, inputs)


class Case:
    """A call, its arguments, and its tensors as the positional arguments of one function."""

    def __init__(self, call: Spec, args: dict[str, Any]) -> None:
        self.call, self.args, self.target = call, args, TARGETS[call["target"]]
        self.names = [n for n in self.target.tensors if isinstance(args.get(n), Tensor)]
        self.tensors = [args[n] for n in self.names]
        self.generator = torch.Generator().manual_seed(call["seed"])

    def function(self, *tensors: Tensor) -> tuple[Any, ...]:
        args = {**self.args, **dict(zip(self.names, tensors, strict=True))}
        return invoke(self.call["target"], args)

    def some(self, *tensors: Tensor) -> tuple[Any, ...]:
        """What torch.func takes: a gradient that was not asked for is no result."""
        return tuple(t for t in self.function(*tensors) if t is not None)

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except AssertionError as error:  # torch asserts, too
            raise Raised(error) from error
        except Exception as error:
            raise Raised(error) from error

    def run(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.attempt(self.function, *(tensors or self.tensors))

    def detached(self) -> list[Tensor]:
        return [t.detach() for t in self.tensors]

    def clones(self) -> list[Tensor]:
        return [t.detach().clone() for t in self.tensors]

    def is_plain(self) -> bool:
        """Whether every tensor is an ordinary one, whose data another way may take apart."""
        return all(
            type(t) in (Tensor, nn.Parameter)
            and t.layout is torch.strided
            and not (t.is_nested or t.is_meta or t.is_quantized or t.is_inference())
            and not (t._is_zerotensor() or t.is_neg())
            for t in self.tensors
        )

    def like(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self.generator, dtype=torch.float64).to(t.dtype)

    def check(self, outs: tuple[Any, ...], **more: Any) -> None:
        if any(isinstance(o, Tensor) and o.is_nested for o in outs):
            return  # of a module; the verdict is that it may
        if not self.target.family.endswith("backward"):
            oracle.check_forward(self.call, self.args, outs, **more)


def bits(what: str, actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if a is None or e is None:
            assert a is e, what
        elif not e.is_meta and not e.is_nested and e.layout is torch.strided:
            a, e = (torch.view_as_real(t) if t.is_complex() else t for t in (plain(a), plain(e)))
            assert same_bits(a, e), f"{what}: other bits"


def described(t: Any) -> Any:
    if t is None:
        return None
    # The stride of one index is anybody's, and so are all where there are no elements.
    strides = [s for n, s in zip(t.shape, t.stride(), strict=True) if n != 1 and t.numel()]
    return tuple(t.shape), strides, t.dtype
