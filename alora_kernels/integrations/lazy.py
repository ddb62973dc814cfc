"""Register with PEFT without importing it: at once if PEFT is loaded, else right after its first import.

In:   nothing; `import alora_kernels` calls `register_with_peft()`.
Out:  a registered `ASYMLORA` type as soon as both libraries are imported, in either order.
Who:  the package's `__init__`.

PEFT takes seconds to import. People who use only the layer never pay for it, and people who write
`import alora_kernels; from peft import get_peft_model` find the type in place.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIBRARY = "peft"
ADAPTER = "alora_kernels.integrations.peft"


class _ThenRegister(Loader):
    """Runs the library's own loader, then imports the integration."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

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


class _AfterImport(MetaPathFinder):
    """Answers once, for the library's first import, and takes itself out of the import system."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != LIBRARY:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_with_peft() -> None:
    """Make PEFT know ALoRA now, or as soon as PEFT is imported. Calling it again changes nothing."""
    if LIBRARY in sys.modules:
        spec = sys.modules[LIBRARY].__spec__
        if not getattr(spec, "_initializing", False):
            importlib.import_module(ADAPTER)
            return
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
