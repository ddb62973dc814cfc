"""Register with PEFT without importing it: at once if PEFT is loaded, else right after its first import.

PEFT takes seconds to import: people who use only the layer never pay for it, and people who write
`import alora_kernels; from peft import get_peft_model` find the type in place.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LIBRARY = "peft"
ADAPTER = "alora_kernels.tuner"


class _ThenRegister(Loader):
    """Runs the library's own loader, then imports the tuner; in all else it is the library's own loader."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)  # a copy before __init__
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # what tools see from now on is the library's own loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        try:
            importlib.import_module(ADAPTER)
        except Exception as error:  # the user asked for the library, not for us: do not break their import
            warnings.warn(
                f"alora_kernels could not register with {LIBRARY} {getattr(module, '__version__', '')}: {error!r};"
                f" `import {ADAPTER}` shows why",
                stacklevel=2,
            )
            return
        # a new list: another thread may be walking through the old one
        sys.meta_path = [finder for finder in sys.meta_path if not isinstance(finder, _AfterImport)]


class _AfterImport(MetaPathFinder):
    """Finds the library as the other finders do, however often it is looked for, until it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LIBRARY:
            return None
        for finder in [f for f in sys.meta_path if not isinstance(f, _AfterImport) and hasattr(f, "find_spec")]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _ThenRegister(spec.loader)
                return spec
        return None


def register_with_peft() -> None:
    """Make PEFT know ALoRA now, or as soon as PEFT is imported. Calling it again changes nothing."""
    if sys.modules.get(LIBRARY) is not None:
        library = importlib.import_module(LIBRARY)  # waits for another thread that is importing it
        if not getattr(library.__spec__, "_initializing", False):
            importlib.import_module(ADAPTER)
            return
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
