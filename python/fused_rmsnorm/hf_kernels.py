"""Layers for Hugging Face's ``kernels`` library, which swaps the ``forward`` of a model's norms.

    from kernels import Mode, kernelize, use_kernel_mapping
    from fused_rmsnorm import hf_kernels

    with use_kernel_mapping(hf_kernels.mapping()):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)

transformers marks its norms for it where it supports the installed version of ``kernels``; then, on
a CPU, ``kernels.register_kernel_mapping(hf_kernels.mapping())`` before ``use_kernels=True`` is
enough. Any class is marked by ``kernels.replace_kernel_forward_from_hub(TheClass, "RMSNorm")``.

Under the one name "RMSNorm" transformers has two ways of rounding (Llama's and OLMo 2's). So the
first call looks at what the class that is replaced computes, by :func:`replace_rms_norm_`; where
no setting gives its numbers, its own forward goes on.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .functional import CastingMode
from .modules import RMSNorm as FusedRMSNorm
from .replace import replace_rms_norm_

__all__ = ["InstalledLayer", "layers", "mapping", "write_local_repository"]

Settings = tuple[float, CastingMode]  # weight_offset, casting_mode

_settings_of_class: dict[type[nn.Module], Settings | None] = {}


def _probe(cls: type[nn.Module]) -> Settings | None:
    norm = cls.__new__(cls)
    nn.Module.__init__(norm)
    norm.weight = nn.Parameter(torch.ones(64))
    norm.variance_epsilon = norm.eps = 1e-6  # type: ignore[assignment]
    new = replace_rms_norm_(nn.ModuleDict({"norm": norm})).get("norm")
    # A subclass would do more than its settings say.
    return (new.weight_offset, new.casting_mode) if type(new) is FusedRMSNorm else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _settings(cls: type[nn.Module]) -> Settings | None:
    """What the class computes; None: nothing that the fused operator does."""
    if cls not in _settings_of_class:
        # In a thread of its own no mode of the caller holds: fake tensors, vmap, a default device.
        with ThreadPoolExecutor(1) as pool:
            _settings_of_class[cls] = pool.submit(_probe, cls).result()
    return _settings_of_class[cls]


def _norm(norm: Any, input: Tensor, eps: float) -> Tensor:
    found = _settings(type(norm))
    if found is None:
        return type(norm).forward(norm, input)
    offset, casting = found
    weight = norm.weight
    return functional.rms_norm(
        input, weight.shape, weight, eps, weight_offset=offset, casting_mode=casting
    )


class layers:
    """By their names in transformers; each a ``forward`` alone, as ``kernels`` asks for."""

    class RMSNorm(nn.Module):
        """Of a module with ``weight`` and ``variance_epsilon``."""

        can_torch_compile = True
        has_backward = True
        weight: Tensor
        variance_epsilon: float

        def forward(self, hidden_states: Tensor) -> Tensor:
            return _norm(self, hidden_states, self.variance_epsilon)

    class RMSNormZeroCentered(nn.Module):
        """Of a module with ``weight``, to which 1 is added, and ``eps``."""

        can_torch_compile = True
        has_backward = True
        weight: Tensor
        eps: float

        def forward(self, x: Tensor) -> Tensor:
            return _norm(self, x, self.eps)


NAMES = ("RMSNorm", "RMSNormZeroCentered")


@dataclass(frozen=True)
class InstalledLayer:
    """A layer of this package, in the place where ``kernels`` has a repository."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        """Asked for by ``kernelize``."""
        return getattr(layers, self.layer_name)

    def __str__(self) -> str:
        return f"the installed fused_rmsnorm, layer `{self.layer_name}`"


def mapping(devices: tuple[str, ...] = ("cpu", "cuda")) -> dict[str, dict[str, Any]]:
    """What ``kernels.use_kernel_mapping`` and ``kernels.register_kernel_mapping`` take.

    Registered for training under torch.compile, which ``kernels`` also uses for the other modes.
    """
    from kernels import Mode

    mode = Mode.TRAINING | Mode.TORCH_COMPILE
    return {name: {device: {mode: InstalledLayer(name)} for device in devices} for name in NAMES}


def write_local_repository(folder: str | Path) -> Path:
    """Writes what ``kernels.LocalLayerRepository(folder, layer_name="RMSNorm")`` reads.

    It refers to the installed package and holds no code of its own, so it is for the environment
    that it is written in.

    Returns:
        ``folder``.
    """
    for backend in ("cpu", "cuda"):
        variant = Path(folder) / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"_fused_rmsnorm_installed_{backend}",
            "name": "fused-rmsnorm",
            "version": 1,
            "license": "BSD-3-Clause",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
        (variant / "__init__.py").write_text("from fused_rmsnorm.hf_kernels import layers\n")
    return Path(folder)
