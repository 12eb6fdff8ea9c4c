"""Goes through a model, swaps what may be swapped, and reports what was done and what was not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ..modules import RMSNorm
from .belongings import short

__all__ = ["FilterFn", "SwapReport", "swap"]

FilterFn = Callable[[str, nn.Module], bool]


class SwapReport(dict[str, RMSNorm]):
    """What was swapped: the new modules by name. ``left``: every other norm by name, and why.

    A norm is what is named one or derives from torch's. Those that were fused before are in
    neither.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left: dict[str, str] = {}

    def __repr__(self) -> str:
        lines = [f"{len(self)} norms swapped, {len(self.left)} left alone"]
        lines += [f"  swapped {name}: {new}" for name, new in self.items()]
        lines += [f"  left    {name or 'the model'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def swap(
    model: nn.Module, like: Callable[[nn.Module], RMSNorm | str], filter_fn: FilterFn | None
) -> SwapReport:
    """Puts ``like(norm)`` in place of every norm of ``model``; a text says why one stays."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but got {type(model).__name__}")
    if filter_fn is not None and not callable(filter_fn):
        kind = type(filter_fn).__name__
        raise TypeError(f"filter_fn must be None or a function of (name, module), but got {kind}")
    report = SwapReport()

    def like_or_why(norm: nn.Module) -> RMSNorm | str:
        try:
            return like(norm)
        except Exception as error:  # it may be any code; none of it is worth more than the model
            return f"looking at it raised {short(error)}"

    if _is_norm(model):
        new = _owner(model) or like_or_why(model)
        if isinstance(new, RMSNorm):
            raise ValueError(
                f"model is itself a {type(model).__name__}, which cannot be replaced in place: "
                "pass the module that contains it"
            )
        report.left[""] = new

    made: dict[int, RMSNorm | str] = {}  # one new module for one that is used twice
    for name, parent, key, child, owner in list(_places(model)):
        if not _is_norm(child):
            continue
        if owner:
            report.left[name] = owner
        elif filter_fn is not None and not filter_fn(name, child):
            report.left[name] = "filter_fn did not return True"
        else:
            if id(child) not in made:
                made[id(child)] = like_or_why(child)
            new = made[id(child)]
            if isinstance(new, str):
                report.left[name] = new
            elif _put(parent, key, new):
                report[name] = new
            else:
                report.left[name] = f"its {type(parent).__name__} does not take another module"
    return report


Place = tuple[str, nn.Module, str, nn.Module, str | None]


def _places(model: nn.Module) -> Iterator[Place]:
    """(name, parent, its key there, child, who owns it) of every place for a module in ``model``.

    Every parent once, and with it all its children, also those that occur twice.
    """
    seen: set[int] = set()

    def below(parent: nn.Module, path: str, owner: str | None) -> Iterator[Place]:
        if id(parent) in seen:
            return
        seen.add(id(parent))
        owner = owner or _owner(parent)
        children = [
            (f"{path}.{key}" if path else key, key, child)
            for key, child in _children(parent)
            if child is not None
        ]
        for name, key, child in children:
            yield name, parent, key, child, owner or _owner(child) or _compiled_alone(parent)
        for name, _, child in children:
            yield from below(child, name, owner)

    return below(model, "", None)


def _children(module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    try:
        return list(module._modules.items())
    except Exception:  # never initialised, or a __getattr__ with rules of its own
        return []


def _is_norm(module: nn.Module) -> bool:
    ours = type(module).__module__.split(".")[0] == __name__.split(".")[0]
    if ours or isinstance(module, RMSNorm):
        return False
    script = isinstance(module, torch.jit.ScriptModule)
    name = str(module.original_name) if script else type(module).__name__
    return "norm" in name.lower() or isinstance(module, (nn.RMSNorm, nn.LayerNorm))


def _owner(module: nn.Module) -> str | None:
    """Why a module and all below it are another's: a swap would not be one, or break it."""
    if isinstance(module, torch.jit.ScriptModule):
        return "part of a ScriptModule, which is compiled already"
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever uses it has imported it
    for name in ("FullyShardedDataParallel", "FSDPModule"):
        kind = getattr(fsdp, name, None)
        if kind is not None and isinstance(module, kind):
            return "under FSDP, which holds on to its modules: replace first, shard then"
    return None


def _compiled_alone(parent: nn.Module) -> str | None:
    # By name: importing torch._dynamo takes seconds. It has compiled this very module.
    if type(parent).__name__ == "OptimizedModule" and "_orig_mod" in parent._modules:
        return "wrapped by torch.compile by itself, which goes on to call it: replace, then compile"
    return None


def _put(parent: nn.Module, key: str, new: RMSNorm) -> bool:
    """By setattr, which is what hooks and wrappers of the parent know about; whether it did it."""
    try:
        setattr(parent, key, new)
    except Exception:  # a class with rules of its own
        return False
    return parent._modules.get(key) is new
