"""Loads the operators: importing this module makes torch.ops.fused_rmsnorm available."""

from __future__ import annotations

from pathlib import Path

import torch

HERE = Path(__file__).parent


def load() -> None:
    """Loads libfused_rmsnorm; the error says what to do where it is missing or does not fit."""
    library = HERE / "lib" / "libfused_rmsnorm.so"
    if not library.exists():
        raise ImportError(
            f"{library} is missing: the extension is not built. In a checkout run `make build`; "
            "to install, `pip install --no-build-isolation .`"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"{library} does not load with torch {torch.__version__} ({error}). It has to be built "
            "against the torch that it runs with: build it again."
        ) from error


load()
