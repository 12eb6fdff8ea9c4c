"""The modes of torch that a norm could ask for, and how its probes are run in each."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["MODES", "as_if_nothing_happened", "in_mode"]

MODES = ("gradients", "no gradients", "autocast", "inference")


@contextmanager
def in_mode(mode: str) -> Iterator[None]:
    """One of MODES; no autocast but in its own."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode == "inference"))
        if mode != "inference":
            stack.enter_context(torch.set_grad_enabled(mode != "no gradients"))
        stack.enter_context(_autocast(mode == "autocast"))
        yield


@contextmanager
def _autocast(enabled: bool) -> Iterator[None]:
    """For CPU and CUDA. torch.autocast("cuda") would do nothing where there is no GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            yield
    finally:
        torch.set_autocast_enabled("cuda", before)


@contextmanager
def as_if_nothing_happened() -> Iterator[None]:
    """Whatever modes the caller is in, probes run in their own; no random number is used up."""
    numpy = sys.modules.get("numpy")
    state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(in_mode("gradients"))
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
