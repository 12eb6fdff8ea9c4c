"""Fused RMSNorm and pRMSNorm for PyTorch, on CPU and CUDA."""

from . import _library as _library  # first: it loads the operators that the others name
from . import functional
from . import scripting as scripting  # tells the modules what torch.jit.script compiles
from ._after_import import import_after
from ._build_info import build_info
from ._info import launch_plan
from .modules import AddRMSNorm, PRMSNorm, RMSNorm, RMSNormGated
from .replace import replace_layer_norm_, replace_rms_norm_

import_after("torch.distributed.tensor", f"{__name__}.distributed")

__version__: str = str(build_info()["version"])

__all__ = [
    "AddRMSNorm",
    "PRMSNorm",
    "RMSNorm",
    "RMSNormGated",
    "build_info",
    "functional",
    "launch_plan",
    "replace_layer_norm_",
    "replace_rms_norm_",
]
