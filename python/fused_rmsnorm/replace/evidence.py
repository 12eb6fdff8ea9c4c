"""Which RMSNorm computes what a norm computes, and how that is known.

What a norm computes is not told by its class name: the families of transformers differ in when
they round, in what they add to the weight, and models bring classes of their own. So only
torch.nn.RMSNorm is known by its type. Of every other class two things are wanted, both of copies:

- What it does has to be the same arithmetic for inputs of any shape and any value, in every mode:
  what it runs is written down (:mod:`.operations`). A branch on a value cannot run there; a branch
  on a shape, dropout, noise, a clamp or a sum over processes show.
- Its numbers and its gradients have to be those of one setting of RMSNorm (:mod:`.probes`): in
  every combination of fp32, bf16 and fp16 input and weight, for rows, matrices and stacks of them.

A norm that takes a gate beside its input is compared with RMSNormGated in the same way, with the
gate and, unless it then raises, without. It may refuse inputs of other ranks than rows and
sequences, as FalconH1's does: what takes its place takes more then, and nothing otherwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any, cast

from torch import Tensor, nn

from ..modules import RMSNorm, RMSNormGated
from .belongings import foreign_parameters, settings, short, what_else_it_carries
from .modes import as_if_nothing_happened
from .operations import may_refuse, needs_its_gate, other_than_arithmetic
from .probes import Probe, agree, gated, probes_of
from .weight_typed import WeightTypedRMSNorm

__all__ = ["Evidence", "adopt"]

# A class, and the options that one of its settings has beside eps.
_Kind = tuple[type[RMSNorm], dict[str, Any]]
_Setting = tuple[type[RMSNorm], float | None, dict[str, Any]]


def _kind(made: type[RMSNorm], weight_offset: float, casting_mode: str, **others: Any) -> _Kind:
    return made, {"weight_offset": weight_offset, "casting_mode": casting_mode, **others}


_KINDS = (
    _kind(RMSNorm, 0.0, "torch"),
    _kind(RMSNorm, 0.0, "llama"),
    _kind(RMSNorm, 1.0, "torch"),
    _kind(WeightTypedRMSNorm, 0.0, "llama"),
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


def adopt(new: RMSNorm, old: nn.Module) -> RMSNorm:
    """Gives ``new`` the parameters, the mode and the other settings of ``old``."""
    for name in ("weight", "bias"):
        # Not by register_parameter, which accelerate's init_empty_weights makes copy it.
        new._parameters[name] = old._parameters.get(name)
    new.elementwise_affine = any(p is not None for p in new._parameters.values())
    for name, value in old.__dict__.items():  # hidden_size: others may read it
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
            with as_if_nothing_happened():
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
    if inputs == (2, 1) and needs_its_gate(norm, shape):
        inputs = (2,)
    for count in inputs:
        why = other_than_arithmetic(norm, shape, inputs, count)
        if why:
            return why
    return _setting_with_its_numbers(norm, shape, all_eps, inputs)


def _eps_of(norm: nn.Module) -> Iterator[float | None]:
    for name in ("variance_epsilon", "eps", "epsilon", "norm_eps"):
        eps = getattr(norm, name, "absent")
        if eps is None or (isinstance(eps, (int, float)) and not isinstance(eps, bool)):
            yield eps


def _setting_with_its_numbers(
    norm: nn.Module, shape: tuple[int, ...], all_eps: list[float | None], inputs: tuple[int, ...]
) -> _Setting | str:
    """Of the RMSNorm that gives the dtypes, numbers and gradients of ``norm``."""
    wanted: list[tuple[Probe, list[Tensor]]] = []
    probes = probes_of(shape, all_eps)
    with_gate = [g for probe in probes for g in gated(probe)] if 2 in inputs else []
    for probe in [*with_gate, *(probes if 1 in inputs else [])]:
        try:
            wanted.append((probe, probe.run(norm)))
        except Exception as error:  # any code at all
            # A row alone may be refused: more is taken than before.
            leading = probe.x.dim() - len(shape)
            if leading > 0 and not may_refuse(leading, inputs):
                return f"running it raised {short(error)}"
    kinds = _gated_kinds(norm, shape[-1]) if 2 in inputs else _KINDS
    for (made, args), eps in product(kinds, all_eps):
        setting = (made, eps, args)
        new = _made(shape, setting, norm)
        if all(agree(probe.run(new), want, probe) for probe, want in wanted):
            return setting
    return "its numbers or gradients are those of no setting of RMSNorm"
