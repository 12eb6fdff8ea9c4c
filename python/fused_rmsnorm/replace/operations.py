"""What a norm runs: written down on the meta device, where tensors have shapes and no values.

It has to be the same for inputs of any shape and in every mode, and nothing but what a norm is made
of. Written down is each operation, with its constants and with the tensors that it reads: a branch
that does the same with another constant, or with another tensor, shows as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .belongings import bare_copy, settings, short
from .modes import MODES, in_mode

__all__ = ["may_refuse", "needs_its_gate", "other_than_arithmetic", "parameters_of"]

# All that a norm is made of; by name, without a trailing _.
_ARITHMETIC = {
    *("add", "sub", "rsub", "mul", "div", "reciprocal", "pow", "square", "sqrt", "rsqrt"),
    *("mean", "sum", "addcmul", "norm", "linalg_vector_norm", "rms_norm"),
    *("_fused_rms_norm", "_fused_rms_norm_backward", "_to_copy", "full", "scalar_tensor"),
    "empty_like",
}
_GATES = {"silu", "sigmoid", "neg", "exp"}
# What moves all of a tensor. What takes a part of one (slice, select) is no part of a norm: which
# part could be a matter of the shape.
_MOVES = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "squeeze", "unsqueeze"),
    *("transpose", "t", "permute", "clone", "contiguous", "copy", "unflatten"),
}
_NOTHING = {"alias", "detach"}  # autograd adds them
# Arguments that follow the shape of the input.
_SIZES = {"size", "sizes", "shape", "stride"}


class _Operations(TorchDispatchMode):
    """Writes down what is run; runs only what is known.

    A tensor goes by the number of the memory that it lies in, which views share: first the tensors
    that are given, then the results. What only moves one gives it no new number.
    """

    def __init__(self, known: set[str], given: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = known
        self.arithmetic: list[str] = []
        self.with_moves: list[str] = []
        self.other: str | None = None
        self.numbers: dict[int, int] = {}
        self.kept: list[Tensor] = []  # or their addresses would be used again
        for tensor in given:
            self._give_number(tensor)

    def _give_number(self, tensor: Tensor, number: int | None = None) -> None:
        self.kept.append(tensor)
        number = len(set(self.numbers.values())) if number is None else number
        self.numbers.setdefault(_memory(tensor), number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # else autograd takes composite operations apart
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        name = _name(func)
        if name in _NOTHING:
            return func(*args, **kwargs)
        if name not in self.known and name not in _MOVES:
            self._refuse(f"it runs {name}, which is no part of a norm")
        read = [self.numbers.get(_memory(t)) for t in _tensors((*args, *kwargs.values()))]
        if None in read:
            self._refuse(f"it reads a tensor that is neither given nor computed, in {name}")
        text = f"{name} of {read} with {_constants(func, args, kwargs)}"
        self.with_moves.append(text)
        if name not in _MOVES:
            self.arithmetic.append(text)
        result = func(*args, **kwargs)
        for tensor in _tensors(result if isinstance(result, (tuple, list)) else (result,)):
            self._give_number(tensor, read[0] if name in _MOVES else None)
        return result

    def _refuse(self, why: str) -> None:
        """Before it is run: it may wait for other processes."""
        self.other = why
        raise RuntimeError(why)


def _name(func: Any) -> str:
    name: str = func._schema.name
    return name.removeprefix("aten::").rstrip("_")


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _constants(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Numbers, dtypes and dimensions, these counted from the last."""
    names = [argument.name for argument in func._schema.arguments]
    found = {**dict(zip(names, args, strict=False)), **kwargs}
    rank = next((t.dim() for t in _tensors(args)), 0)
    if "dim" in found and _name(func) not in _MOVES:
        dims = found["dim"] if isinstance(found["dim"], (list, tuple)) else [found["dim"]]
        found["dim"] = [d - rank if isinstance(d, int) and d >= 0 else d for d in dims]
    return {k: v for k, v in found.items() if k not in _SIZES and not isinstance(v, Tensor)}


# Leading sizes of inputs: what a branch on a shape could ask for (one row, as many rows as columns,
# a sequence of a million, a batch that is no multiple of anything). For other dtypes some of them,
# for other modes the large ones: of the small ones numbers are compared.
_SHAPES: tuple[tuple[int, ...], ...] = (
    *((1,), (3,), (1 << 12,), (1 << 24,), (1, 1), (2, 3), (1, 1 << 13), (1, 1 << 20), (513, 130)),
    *((1, 1, 1), (2, 3, 4), (65, 1, 1030), (1, 1 << 20, 8), (1, 8, 1 << 20), (2, 3, 4, 5)),
)
_SMALL: tuple[tuple[int, ...], ...] = ((2, 3),)
_LARGE: tuple[tuple[int, ...], ...] = ((1 << 24,), (3, 1 << 20))
# Of input and weight, and the modes that they are tried in.
_DTYPES = {
    (torch.float32, torch.float32): MODES,
    (torch.bfloat16, torch.float32): MODES,
    (torch.bfloat16, torch.bfloat16): MODES,
    (torch.float16, torch.float32): MODES[:1],
    (torch.float16, torch.float16): MODES[:1],
}
_GATED_RANKS = (1, 2)  # of leading dimensions: a gated norm has to take rows and sequences


def may_refuse(leading: int, inputs: tuple[int, ...]) -> bool:
    """Whether a norm of so many inputs may raise for this number of leading dimensions."""
    return 2 in inputs and leading not in _GATED_RANKS


def parameters_of(norm: nn.Module) -> list[str]:
    return [name for name, p in norm._parameters.items() if p is not None]


@dataclass
class _Run:
    """One call of ``norm`` on the meta device, with ``count`` tensors of one shape."""

    norm: nn.Module
    count: int
    size: tuple[int, ...]
    dtype: torch.dtype
    mode: str
    strided: bool = False  # rows that do not lie one after the other
    y: Any = None
    raised: str = ""
    ran: _Operations = field(init=False)

    def __post_init__(self) -> None:
        with in_mode(self.mode), torch.device("meta"):
            size = (*self.size[:-1], 2, self.size[-1]) if self.strided else self.size
            ones = torch.ones(size, dtype=self.dtype, requires_grad=self.mode == "gradients")
            given = [ones * 1 for _ in range(self.count)]  # results, as a model's: no leaves
            if self.strided:
                given = [x.select(-2, 0) for x in given]
            known = _ARITHMETIC | _GATES if self.count == 2 else _ARITHMETIC
            self.ran = _Operations(known, [*given, *self.norm.parameters()])
            try:
                with self.ran:
                    self.y = self.norm.forward(*given)
            except Exception as error:  # any code at all; its reason is the reason
                self.raised = f"with an input of rank {len(self.size)} it raises {short(error)}"


@dataclass
class _Looks:
    """At a norm with inputs and weights of two dtypes; what was seen first, and what was after."""

    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    arithmetic: list[str] | None = None
    of_rank: dict[int, list[str]] = field(default_factory=dict)  # with the moves
    refused: set[int] = field(default_factory=set)  # ranks

    def why_not(self, run: _Run) -> str | None:
        if run.ran.other:
            return run.ran.other
        rank = len(run.size)
        if run.raised:
            if rank in self.of_rank or not may_refuse(rank - len(self.shape), self.inputs):
                return run.raised
            self.refused.add(rank)
            return None
        if rank in self.refused:
            return f"it raises for some inputs of rank {rank}"
        if not isinstance(run.y, Tensor) or run.y.shape != run.size:
            return "it does not return one tensor of its input's shape"
        if self.arithmetic is None:
            self.arithmetic = run.ran.arithmetic
        moves = run.ran.with_moves
        if not run.strided:  # else it may have to be copied
            moves = self.of_rank.setdefault(rank, moves)
        if run.ran.arithmetic != self.arithmetic or run.ran.with_moves != moves:
            return "what it runs depends on the shape of its input or on its mode"
        return None


def _on_meta(norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> Any:
    values = {name: torch.empty(shape, dtype=dtype, device="meta") for name in parameters_of(norm)}
    return bare_copy(norm, values, training)


def other_than_arithmetic(
    norm: nn.Module, shape: tuple[int, ...], inputs: tuple[int, ...], count: int
) -> str | None:
    """What ``norm``, given ``count`` of its inputs, does beside a norm's arithmetic, or differently
    for another shape or mode."""
    for (x_type, w_type), modes in _DTYPES.items():
        looks = _Looks(inputs, shape)
        for training, mode in product((True, False), modes):
            probe = _on_meta(norm, shape, w_type, training)
            before = settings(probe)
            for lead, strided in _inputs(shape[-1], x_type, first=looks.arithmetic is None):
                run = _Run(probe, count, (*lead, *shape), x_type, mode, strided)
                why = looks.why_not(run)
                if why:
                    return why
            if settings(probe) != before:
                return "its forward changes its own attributes"
    return _takes_longer_rows(norm, shape, count)


def _inputs(n: int, dtype: torch.dtype, first: bool) -> list[tuple[tuple[int, ...], bool]]:
    """Leading sizes, and whether the rows lie apart."""
    if not first:
        return [(lead, False) for lead in _LARGE]
    if dtype != torch.float32:
        return [(lead, False) for lead in (*_SMALL, *_LARGE)]
    square = ((n,), (3, n), (n, 2), (5, n, 3))
    return [(lead, False) for lead in (*_SHAPES, *square)] + [((7,), True), ((2, 300), True)]


def _takes_longer_rows(norm: nn.Module, shape: tuple[int, ...], count: int) -> str | None:
    n = shape[-1]
    probe = _on_meta(norm, shape, torch.float32, training=False)
    longer = (3, 5, *shape[:-1], 2 * n)
    if _Run(probe, count, longer, torch.float32, MODES[0]).raised:
        return None
    return f"it takes rows of {2 * n} numbers, too, with a weight of {n}"


def needs_its_gate(norm: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether every call without a gate raises, although its forward has a default for one."""
    for training, lead in product((True, False), ((3,), (2, 3))):
        probe = _on_meta(norm, shape, torch.float32, training)
        run = _Run(probe, 1, (*lead, *shape), torch.float32, MODES[0])
        if not run.raised or run.ran.other:
            return False
        values = torch.ones(shape, device="cpu")
        probe = bare_copy(norm, dict.fromkeys(parameters_of(norm), values), training)
        try:
            probe.forward(torch.ones(*lead, *shape, device="cpu"))
        except Exception:  # any code at all
            continue
        return False
    return True
