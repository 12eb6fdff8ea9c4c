"""Keeps torch.nn.TransformerEncoderLayer from running an RMSNorm as LayerNorm.

In evaluation without gradients that layer calls none of its modules: it reads ``eps``, ``weight``
and ``bias`` of norm1 and norm2 and gives them to a kernel that subtracts the mean. It does call its
modules if one of them has a forward hook, so that no hook is left out (pytorch/pytorch#128413). So
a norm that is put into such a layer gets a hook, which does nothing. Copies and pickles carry it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

__all__ = ["call_in_encoder_layers"]


def must_be_called(module: nn.Module, args: Any) -> None:
    """Changes nothing: that a module has a forward hook says that it has to be called."""


def call_in_encoder_layers(kind: type[nn.Module]) -> None:
    """From now on modules of this kind are called by every encoder layer that they are put into.

    Whether by assignment, ``setattr``, ``set_submodule`` or ``add_module``, and also inside of a
    wrapper. What writes to ``layer._modules`` itself is not seen.
    """

    def put(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None or not isinstance(parent, nn.TransformerEncoderLayer):
            return
        for module in child.modules():
            hooks = module._forward_pre_hooks
            if isinstance(module, kind) and must_be_called not in hooks.values():
                module.register_forward_pre_hook(must_be_called)

    _never_traced(put)
    register_module_module_registration_hook(put)


def _never_traced(function: Callable[..., Any]) -> None:
    """What torch.compiler.disable does, without importing Dynamo.

    Where Dynamo compiles whatever runs (compiled autograd, switched on for the process), ``put``
    would give it modules that are still being made, which it cannot trace.
    """
    frames: Any = torch._C._dynamo.eval_frame
    if not hasattr(frames, "set_code_exec_strategy"):  # another torch than 2.13 and 2.14, perhaps
        return
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(function.__code__, skip)
