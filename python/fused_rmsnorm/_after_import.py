"""Imports a module of this package once another package has been imported.

torch.distributed.tensor takes half a second to import and most programs never do: what is to be
registered with it waits until the program has imported it, without a check in any call.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Finder:
    """Stands first in sys.meta_path until ``awaited`` has been executed."""

    def __init__(self, awaited: str, module: str) -> None:
        self.awaited, self.module = awaited, module
        self.asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Another finder of this kind (a package that was reloaded) asks this one in turn.
        if name != self.awaited or self.asking:
            return None
        self.asking = True
        try:
            spec = self._of_the_others(name, path, target)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _import(self.module, self.awaited)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _of_the_others(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        """As the import system asks them, which passes over what has no ``find_spec``."""
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


def _import(module: str, awaited: str) -> None:
    """An error, as with a version that lacks a name, is no reason to fail for who only imports."""
    try:
        importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        warnings.warn(
            f"{module} does not fit this version of {awaited}, with which this package will "
            f"therefore not work: {error}",
            stacklevel=2,
        )


def import_after(awaited: str, module: str) -> None:
    """Imports ``module`` now if ``awaited`` has been imported, or right after it is."""
    if awaited in sys.modules:
        _import(module, awaited)
    else:
        sys.meta_path.insert(0, _Finder(awaited, module))
