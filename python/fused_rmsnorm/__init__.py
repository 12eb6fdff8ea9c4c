"""Fused RMSNorm and pRMSNorm for PyTorch, on CPU and CUDA."""

from . import _library, functional
from ._info import build_info, launch_plan
from .modules import AddRMSNorm, PRMSNorm, RMSNorm

__version__: str = build_info()["version"]

__all__ = [
    "AddRMSNorm",
    "PRMSNorm",
    "RMSNorm",
    "build_info",
    "functional",
    "launch_plan",
]
