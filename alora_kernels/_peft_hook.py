"""Register with PEFT without importing it: at once if PEFT is loaded, else right after its first import.

PEFT takes seconds to import: people who use only the layer never pay for it, and people who write
`import alora_kernels; from peft import get_peft_model` find the type in place.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

LIBRARY = "peft"
ADAPTER = "alora_kernels.tuner"


def _then_register(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    """What the library's own loader does, then the import of the tuner."""
    load(module)
    if module.__name__ != LIBRARY:
        return  # of a loader that loads more than this module
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
        finders = [f for f in sys.meta_path if not isinstance(f, _AfterImport) and hasattr(f, "find_spec")]
        spec = next(filter(None, (f.find_spec(fullname, path, target) for f in finders)), None)
        if spec is not None and spec.loader is not None and hasattr(spec.loader, "exec_module"):
            own = spec.loader
            own.exec_module = partial(_then_register, own.exec_module)  # type: ignore[method-assign]
        return spec


def register_with_peft() -> None:
    """Make PEFT know ALoRA now, or as soon as PEFT is imported. Calling it again changes nothing."""
    if sys.modules.get(LIBRARY) is not None:
        library = importlib.import_module(LIBRARY)  # waits for another thread that is importing it
        if not getattr(library.__spec__, "_initializing", False):
            importlib.import_module(ADAPTER)
            return
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
