"""Which RMSNorm computes what a norm computes, and how that is known.

What a norm computes is not told by its class name: the families of transformers differ in when
they round, in what they add to the weight, and models bring classes of their own. So only
torch.nn.RMSNorm is known by its type. Of every other class two things are wanted, both of copies:

- What it does has to be the same arithmetic for inputs of any shape and any value, in training and
  evaluation. It is run on the meta device, where tensors have no values, in many shapes, and the
  operations are written down: they have to be the same ones each time, and none but what a norm is
  made of. A branch on a value cannot run there; a branch on a shape, dropout, noise, a clamp or a
  sum over processes show.
- Its numbers and its gradients have to be those of one setting of RMSNorm: in every combination of
  fp32, bf16 and fp16 input and weight, for rows, matrices and stacks of them.

A norm that takes a gate beside its input is compared with RMSNormGated in the same way, with the
gate and, where its forward has a default for it, without. It may refuse inputs of other ranks than
rows and sequences, as FalconH1's does: what takes its place takes more then, and nothing otherwise.
"""

from __future__ import annotations

import inspect
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import functional
from ..modules import RMSNorm, RMSNormGated
from ..nested import of_each_sequence
from .belongings import bare_copy, foreign_parameters, settings, short, what_else_it_carries

__all__ = ["Evidence", "adopt"]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float32, *_HALF)


class _WeightTypedRMSNorm(RMSNorm):
    """T5's rule: x * r is rounded if the weight is of a half type, and to that type."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Tensor) and input.is_nested:
            return of_each_sequence(self.forward, input)
        weight_type = self.weight.dtype
        if input.dtype == weight_type or weight_type not in _HALF:
            return super().forward(input.to(torch.promote_types(input.dtype, weight_type)))
        shape = tuple(self.normalized_shape)
        return (
            functional.rms_norm(input.float(), shape, None, self.eps).to(weight_type) * self.weight
        )


# A class, and the options that one of its settings has beside eps.
_Kind = tuple[type[RMSNorm], dict[str, Any]]
_Setting = tuple[type[RMSNorm], float | None, dict[str, Any]]


def _kind(made: type[RMSNorm], weight_offset: float, casting_mode: str, **others: Any) -> _Kind:
    return made, {"weight_offset": weight_offset, "casting_mode": casting_mode, **others}


_KINDS = (
    _kind(RMSNorm, 0.0, "torch"),
    _kind(RMSNorm, 0.0, "llama"),
    _kind(RMSNorm, 1.0, "torch"),
    _kind(_WeightTypedRMSNorm, 0.0, "llama"),
)


def _gated_kinds(norm: nn.Module, n: int) -> Iterator[_Kind]:
    sizes = [getattr(norm, "group_size", None)]
    sizes += [n // g for name in ("n_groups", "num_groups") if (g := getattr(norm, name, 0))]
    group = next((s for s in sizes if isinstance(s, int) and s > 0 and n % s == 0), None)
    for first, mode, act in product((False, True), ("llama", "torch"), ("silu", "sigmoid")):
        yield _kind(
            *(RMSNormGated, 0.0, mode), norm_before_gate=first, activation=act, group_size=group
        )


_ONE_INPUT = (
    [(inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty)],
    [(inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.empty)],
)


def _inputs_of(takes: inspect.Signature) -> tuple[int, ...]:
    """How many tensors a forward may be given: (1,), or (2,) and (2, 1) with a gate; else ()."""
    found = [(one.kind, one.default) for one in takes.parameters.values()]
    if found in _ONE_INPUT:
        return (1,)
    if len(found) != 2 or list(takes.parameters)[1] != "gate" or found[:1] not in _ONE_INPUT:
        return ()
    kind, default = found[1]
    if kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return ()
    return (2,) if default is inspect.Parameter.empty else (2, 1) if default is None else ()


# All that a norm is made of, and what moves or converts numbers; by name, without a trailing _.
_ARITHMETIC = {
    *("add", "sub", "rsub", "mul", "div", "reciprocal", "pow", "square", "sqrt", "rsqrt"),
    *("mean", "sum", "addcmul", "norm", "linalg_vector_norm", "rms_norm", "rms_norm_fwd"),
    *("_fused_rms_norm", "_fused_rms_norm_backward", "_to_copy", "full", "scalar_tensor"),
}
_GATES = {"silu", "sigmoid", "neg", "exp"}
_MOVES = {
    *("view", "_unsafe_view", "reshape", "_reshape_alias", "expand", "squeeze", "unsqueeze"),
    *("transpose", "t", "permute", "alias", "detach", "clone", "contiguous", "copy", "slice"),
    *("as_strided", "select", "lift_fresh", "empty_like", "unflatten", "to"),
}


def adopt(new: RMSNorm, old: nn.Module) -> RMSNorm:
    """Gives ``new`` the parameters, the mode and the other settings of ``old``."""
    for name in ("weight", "bias"):
        # Not by register_parameter, which accelerate's init_empty_weights makes copy it.
        new._parameters[name] = old._parameters.get(name)
    new.elementwise_affine = any(p is not None for p in new._parameters.values())
    for name, value in old.__dict__.items():  # variance_epsilon: others may read it
        if name not in new.__dict__ and not hasattr(type(new), name) and not callable(value):
            new.__dict__[name] = value
    return new.train(old.training)


class Evidence:
    """Finds the RMSNorm of a norm; looks once at those that are alike."""

    def __init__(self) -> None:
        # What was found by settings: the arguments of a new one, or why there is none.
        self.seen: dict[Any, _Setting | str] = {}

    def fused_like(self, norm: nn.Module) -> RMSNorm | str:
        """The RMSNorm that computes what ``norm`` does, with its parameters; or why not."""
        if isinstance(norm, nn.LayerNorm):
            return "a LayerNorm, which subtracts the mean"
        of_torch = isinstance(norm, nn.RMSNorm)
        shape = tuple(cast(nn.RMSNorm, norm).normalized_shape) if of_torch else None
        why = what_else_it_carries(norm) or foreign_parameters(norm, shape)
        if why:
            return why
        if shape is None:
            shape = tuple(cast(Tensor, norm.weight).shape)
        if type(norm) is nn.RMSNorm:
            return _made(shape, (RMSNorm, norm.eps, _KINDS[0][1]), norm)
        key = settings(norm)
        if key not in self.seen:
            with _as_if_nothing_happened():
                self.seen[key] = _looked_at(norm, shape)
        found = self.seen[key]
        return found if isinstance(found, str) else _made(shape, found, norm)


def _made(shape: tuple[int, ...], setting: _Setting, norm: nn.Module) -> RMSNorm:
    made, eps, args = setting
    return adopt(made(list(shape), eps, device="meta", **args), norm)


def _looked_at(norm: nn.Module, shape: tuple[int, ...]) -> _Setting | str:
    takes = inspect.signature(norm.forward)
    inputs = _inputs_of(takes)
    if not inputs:
        return f"its forward takes {takes} and not one input, or one and a gate"
    all_eps = list(dict.fromkeys(_eps_of(norm)))
    if not all_eps:
        return "it has no epsilon by a name that is known"
    for count in inputs:
        why = _other_than_arithmetic(norm, shape, inputs, count)
        if why:
            return why
    return _setting_with_its_numbers(norm, shape, all_eps, inputs)


def _eps_of(norm: nn.Module) -> Iterator[float | None]:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        eps = getattr(norm, name, "absent")
        if eps is None or (isinstance(eps, (int, float)) and not isinstance(eps, bool)):
            yield eps


@contextmanager
def _as_if_nothing_happened() -> Iterator[None]:
    """Whatever modes the caller is in, probes run in none; and no random number is used up."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch warns of the mixed dtypes that are tried here
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numpy_state)


class _Operations(TorchDispatchMode):
    """Writes down what is run, but for what only moves numbers; runs arithmetic alone."""

    def __init__(self, known: set[str]) -> None:
        super().__init__()
        self.known = known
        self.names: list[str] = []
        self.other: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name not in _MOVES:
            self.names.append(name)
            if name not in self.known:
                self.other = name
                raise RuntimeError(name)  # not run: it may wait for other processes
        return func(*args, **(kwargs or {}))


# Leading sizes of inputs: what a branch on a shape could ask for (one row, as many rows as columns,
# a long sequence, a batch that is no multiple of anything); a few of them for the other modes.
_SHAPES: tuple[tuple[int, ...], ...] = (
    *((1,), (3,), (1 << 16,), (1, 1), (2, 3), (1, 1 << 14), (513, 130)),
    *((1, 1, 1), (2, 3, 4), (65, 1, 1030), (2, 3, 4, 5)),
)
_FEW: tuple[tuple[int, ...], ...] = ((1 << 12,), (1, 1), (2, 300, 4))


_GATED_RANKS = (1, 2)  # of leading dimensions: a gated norm has to take rows and sequences


def _may_refuse(x: Tensor, shape: tuple[int, ...], inputs: tuple[int, ...]) -> bool:
    """Whether a norm of so many inputs may raise for x, for its rank alone."""
    return 2 in inputs and x.dim() - len(shape) not in _GATED_RANKS


def _other_than_arithmetic(
    norm: nn.Module, shape: tuple[int, ...], inputs: tuple[int, ...], count: int
) -> str | None:
    """What ``norm``, given ``count`` of its inputs, does beside a norm's arithmetic, or differently
    for another shape or mode."""
    n = shape[-1]
    square = ((n,), (3, n), (n, 2), (5, n, 3))
    half, full = torch.bfloat16, torch.float32
    for x_type, w_type in ((full, full), (half, full), (half, half)):
        first: list[str] | None = None
        for training, grad in product((True, False), (True, False)):
            values = torch.empty(shape, dtype=w_type, device="meta")
            probe = bare_copy(norm, dict.fromkeys(_parameters(norm), values), training)
            before = settings(probe)
            taken: set[int] = set()  # ranks
            refused: set[int] = set()
            for lead in _FEW if first or x_type is half else (*_SHAPES, *square):
                x = torch.empty(*lead, *shape, dtype=x_type, device="meta")
                ran = _Operations(_ARITHMETIC | _GATES if count == 2 else _ARITHMETIC)
                y, raised = None, ""
                try:
                    with torch.device("meta"), torch.set_grad_enabled(grad), ran:
                        y = probe(x, torch.empty_like(x)) if count == 2 else probe(x)
                except Exception as error:  # any code at all; its reason is the reason
                    raised = f"with an input of rank {x.dim()} it raises {short(error)}"
                if ran.other:
                    return f"it runs {ran.other}, which is no part of a norm"
                if raised and not _may_refuse(x, shape, inputs):
                    return raised
                (refused if raised else taken).add(x.dim())
                if refused & taken:
                    return raised or f"it raises for some inputs of rank {x.dim()}"
                if raised:
                    continue
                if not isinstance(y, Tensor) or y.shape != x.shape:
                    return "it does not return one tensor of its input's shape"
                first = first or ran.names
                if ran.names != first:
                    return "what it runs depends on the shape of its input or on its mode"
            if settings(probe) != before:
                return "its forward changes its own attributes"
    return None


def _parameters(norm: nn.Module) -> list[str]:
    return [name for name, p in norm._parameters.items() if p is not None]


@dataclass
class _Probe:
    """An input (and a gate) and a weight, and what is asked for: the result, or the gradients."""

    x: Tensor
    w: Tensor
    training: bool
    gradients: bool = False
    gate: Tensor | None = None

    def run(self, norm: nn.Module) -> list[Tensor]:
        """Raises what ``norm`` raises, and ValueError if it writes into its input."""
        names = _parameters(norm)
        values = {name: self.w if name == "weight" else self.w.flip(0) for name in names}
        copy = bare_copy(norm, values, self.training)
        given = [t for t in (self.x, self.gate) if t is not None]
        inputs = [t.clone().requires_grad_(self.gradients) for t in given]
        with torch.device("cpu"), torch.set_grad_enabled(self.gradients):
            y = copy(*inputs)
        if not self.gradients:
            if not all(map(torch.equal, inputs, given)):
                raise ValueError("it writes into its input")
            return [y]
        dy = _numbers(self.x.shape[:1], tuple(self.x.shape[1:]), seed=8)[0]
        return list(torch.autograd.grad(y, [*inputs, *copy.parameters()], dy))


def _probes(shape: tuple[int, ...]) -> list[_Probe]:
    x, w = _numbers((8,), shape, seed=0)
    probes = [_Probe(x.to(a), w.to(b), False) for a, b in product(_DTYPES, _DTYPES)]
    leads = ((), (1,), (5,), (2, 3), (4, 1, 2), (2, 3, 2, 2))
    for seed, (lead, dtype) in enumerate(product(leads, (torch.float32, torch.float64))):
        x, w = (t.to(dtype) for t in _numbers(lead, shape, seed))
        probes += [_Probe(x, w, training) for training in (True, False)]
    x, w = _numbers((3, 5), shape, seed=7)
    return probes + [_Probe(x, w, training, gradients=True) for training in (True, False)]


def _gated(probe: _Probe) -> Iterator[_Probe]:
    """The probe with a gate of numbers to both sides of 0, in its dtype and in another."""
    rows = torch.linspace(-3, 3, probe.x.numel(), device="cpu").view(probe.x.shape)
    gate = rows + probe.x.float().sign()
    yield replace(probe, gate=gate.to(probe.x.dtype))
    if probe.x.dtype in _HALF:
        yield replace(probe, gate=gate)


def _setting_with_its_numbers(
    norm: nn.Module, shape: tuple[int, ...], all_eps: list[float | None], inputs: tuple[int, ...]
) -> _Setting | str:
    """Of the RMSNorm that gives the dtypes, numbers and gradients of ``norm``."""
    wanted: list[tuple[_Probe, list[Tensor]]] = []
    probes = _probes(shape)
    gated = [g for probe in probes for g in _gated(probe)] if 2 in inputs else []
    for probe in [*gated, *(probes if 1 in inputs else [])]:
        try:
            wanted.append((probe, probe.run(norm)))
        except Exception as error:  # any code at all
            # A row alone may be refused: more is taken than before.
            if probe.x.shape != shape and not _may_refuse(probe.x, shape, inputs):
                return f"running it raised {short(error)}"
    kinds = _gated_kinds(norm, shape[-1]) if 2 in inputs else _KINDS
    for (made, args), eps in product(kinds, all_eps):
        setting = (made, eps, args)
        new = _made(shape, setting, norm)
        if all(_agree(probe.run(new), want, probe.gradients) for probe, want in wanted):
            return setting
    return "its numbers or gradients are those of no setting of RMSNorm"


def _agree(got: list[Tensor], want: list[Tensor], gradients: bool) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and _close(a, b, gradients)
        for a, b in zip(got, want, strict=True)
    )


def _numbers(lead: tuple[int, ...], shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Input and weight. The rows are of all magnitudes: eps decides in the first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, *shape, generator=generator, device="cpu", dtype=torch.float32)
    rows = x.view(-1, *shape)
    scales = torch.logspace(-4, 2, max(len(rows), 2), device="cpu", dtype=torch.float32)
    scales = scales[: len(rows)].view(-1, *(1 for _ in shape))
    w = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32) + 0.5
    return (rows * scales).view(x.shape), w


def _close(got: Tensor, want: Tensor, gradients: bool) -> bool:
    """The same but for how a sum is added up, which changes one result in ten thousand.

    Another order of rounding changes a fifth of all results by a bf16 or fp16 step.
    """
    got, want = got.float(), want.float()
    rtol, atol = 1e-4, torch.tensor(1e-6, device="cpu")
    if gradients:  # sums of terms that cancel: judged by the largest of the row
        rtol, atol = 1e-3, 1e-4 * want.abs().amax(-1, keepdim=True)
    wrong = ~((got - want).abs() <= atol + rtol * want.abs())
    return bool(wrong.float().mean() <= 0.02)
