"""Loads what was built for this torch: the operators, and the folder of ``_eager``.

One package may hold builds for several versions of torch, each in lib/torch-<minor version>; the
kernels beside those folders know no torch. A torch or a Python that there is no build for is an
ImportError that says which there are, not a missing symbol in the middle of a program.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch

LIBRARIES = Path(__file__).parent / "lib"
PREFIX = "torch-"
BUILD = "pip install --no-build-isolation SOURCE (a checkout or the source distribution)"


def minor(version: str) -> str:
    """ "2.13.0+cpu" -> "2.13": what one build serves."""
    return ".".join(version.split("+")[0].split(".")[:2])


def built_for() -> list[str]:
    """The minor versions of torch that this package holds builds for, in order."""
    found = (p.parent.name.removeprefix(PREFIX) for p in LIBRARIES.glob(f"{PREFIX}*/lib*.so"))
    return sorted(found, key=lambda version: [int(n) for n in version.split(".")])


def load() -> None:
    """Loads libfused_rmsnorm, and lets ``from . import _eager`` find the one that goes with it."""
    folder = LIBRARIES / (PREFIX + minor(torch.__version__))
    library = folder / "libfused_rmsnorm.so"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(_why_not(library, error)) from (error if library.exists() else None)
    sys.modules[__package__].__path__.insert(0, str(folder))
    for module, holds in (("_eager", folder), ("_info", LIBRARIES.parent)):
        try:
            import_module(f"{__package__}.{module}")
        except ModuleNotFoundError as error:
            raise ImportError(_another_python(module, holds)) from error


def _why_not(library: Path, error: OSError) -> str:
    reason = error.__cause__ or error  # the linker's, of which torch makes "could not load"
    if library.exists():
        return (
            f"{library} does not load with torch {torch.__version__} ({reason}). It has to be "
            f"built against the torch that it runs with: {BUILD}"
        )
    if known := built_for():
        return (
            f"this build of fused_rmsnorm is for torch {', '.join(known)}, but torch is "
            f"{torch.__version__}: install one of those, or build from source for this one: {BUILD}"
        )
    return (
        f"{library} is missing: the extension is not built. In a checkout run `make build`; "
        "to install, `pip install --no-build-isolation .`"
    )


def _another_python(module: str, folder: Path) -> str:
    """``module`` is there, by the names that other Pythons give their extensions, or not at all."""
    import sysconfig  # only here: it takes a while

    pythons = sorted(path.name.split(".")[1] for path in folder.glob(f"{module}.*.so"))
    if not pythons:
        return f"{folder / module} is missing: the build is not complete. Build it again: {BUILD}"
    return (
        f"this build of fused_rmsnorm is for {', '.join(pythons)}, but this Python is "
        f"{sysconfig.get_config_var('SOABI')}: run that one, or build for this one: {BUILD}"
    )


load()
