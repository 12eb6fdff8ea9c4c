"""What a module carries beside the weight and the bias that its swap would keep."""

from __future__ import annotations

import copy
import enum
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bare_copy", "foreign_parameters", "settings", "short", "what_else_it_carries"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum)
_PLAIN_OF_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)

# What a class may define of what nn.Module defines. Anything else (state_dict, __call__, train,
# _apply, get_extra_state, ...) changes what the module is to others.
_OWN = {"__init__", "forward", "extra_repr", "__repr__", "__dir__", "__doc__", "_version"} | {
    *("__module__", "__qualname__", "__dict__", "__weakref__", "__hash__", "__annotations__"),
    *("__annotate__", "__annotate_func__", "__annotations_cache__"),  # Python 3.14
    *("__firstlineno__", "__static_attributes__", "call_super_init", "dump_patches"),
}
_COPYING = {"__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__"}
_WORDS = {"_buffers": "buffers", "_modules": "modules of its own"}


def what_else_it_carries(norm: nn.Module) -> str | None:
    """In words, or None if there is nothing but parameters and plain settings."""
    if "_hf_hook" in norm.__dict__:
        return "it has a hook of accelerate, which moves its parameters: replace, then dispatch"
    empty = nn.Module().__dict__
    for name, held in norm.__dict__.items():
        if name in empty:
            # Hooks of any kind, buffers and modules are dicts; parameters are looked at apart.
            if name != "_parameters" and isinstance(held, (dict, set)) and _occupied(held):
                what = _WORDS.get(name, name.strip("_").replace("_", " "))
                return f"it has {what}{_keys(held)}"
        elif name == "_compiled_call_impl" and held is not None:
            return "it is compiled by itself: replace, then compile"
        elif callable(held) and hasattr(type(norm), name):
            return f"it has a {name} of its own, in place of its class's"
        elif not _is_plain(held):
            return f"it holds {name} of type {type(held).__name__}"
    return _overridden(type(norm))


def _occupied(held: dict[Any, Any] | set[Any]) -> bool:
    return bool(held) and (isinstance(held, set) or any(v is not None for v in held.values()))


def _keys(held: dict[Any, Any] | set[Any]) -> str:
    names = [key for key in held if isinstance(key, str)]
    return f": {', '.join(names)}" if names else ""


def _overridden(kind: type) -> str | None:
    for base in kind.__mro__:
        if base in (nn.Module, nn.RMSNorm, nn.LayerNorm, object):
            continue
        for name in vars(base):
            known = name in vars(nn.Module) or name in _COPYING
            if known and name not in _OWN:
                return f"its class overrides {name}"
    return None


def _is_plain(value: Any) -> bool:
    """Nothing that could hold a model's state, or be another's."""
    if isinstance(value, dict):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, (*_PLAIN, *_PLAIN_OF_TORCH, *_FUNCTIONS))


def foreign_parameters(norm: nn.Module, shape: Sequence[int] | None = None) -> str | None:
    """Why the parameters are not a plain weight and bias of ``shape``, or None.

    Without ``shape``: that of the weight, which has to be a vector.
    """
    held = {name: p for name, p in norm._parameters.items() if p is not None}
    others = held.keys() - {"weight", "bias"}
    if others:
        return f"it has parameters beside weight and bias: {', '.join(sorted(others))}"
    if shape is None and "weight" not in held:
        return "it has no weight"
    for name, parameter in held.items():
        why = _foreign(parameter)
        if why:
            return f"its {name} {why}"
    if shape is None:
        shape = held["weight"].shape
        if len(shape) != 1:
            return f"its weight is not a vector, but has shape {list(shape)}"
    for name, parameter in held.items():
        if tuple(parameter.shape) != tuple(shape):
            return f"its {name} has shape {list(parameter.shape)} and not {list(shape)}"
    return None


def _foreign(parameter: Any) -> str | None:
    # Lazy ones, DTensors and quantised tensors are classes of their own.
    if type(parameter) is not nn.Parameter:
        return f"has type {type(parameter).__name__}, not torch.nn.Parameter"
    if parameter.layout is not torch.strided or parameter.dtype not in _FLOATS:
        return f"has layout {parameter.layout} and dtype {parameter.dtype}"
    if parameter.numel() == 0:
        return "has no elements (one that is kept elsewhere, as a shard?)"
    return None


def settings(norm: nn.Module) -> tuple[Any, ...]:
    """Equal for two modules of one class that compute the same but for their parameters' values."""
    empty = nn.Module().__dict__
    parameters = {name: p is None or p.shape for name, p in norm._parameters.items()}
    plain = sorted((name, repr(v)) for name, v in norm.__dict__.items() if name not in empty)
    return type(norm), repr(parameters), tuple(plain)


def bare_copy(norm: nn.Module, parameters: dict[str, Tensor], training: bool) -> nn.Module:
    """A copy of ``norm``, which carries nothing else, with these parameters.

    Not by its __deepcopy__ nor by register_parameter, which others change (accelerate's
    ``init_empty_weights``).
    """
    new: nn.Module = object.__new__(type(norm))
    fresh = nn.Module().__dict__
    new.__dict__.update(fresh)
    for name, held in norm.__dict__.items():
        if name not in fresh:
            new.__dict__[name] = copy.deepcopy(held)
    new.__dict__["training"] = training
    for name in norm._parameters:
        value = parameters.get(name)
        new._parameters[name] = None if value is None else nn.Parameter(value)
    return new


def short(error: Exception) -> str:
    """Type and first line of an exception."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text[:200]}"
