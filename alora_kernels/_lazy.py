"""Names of a package that import their module when asked for: its libraries may take seconds, or be missing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def names_later(
    package: str, where: Mapping[str, str], *, needs: Sequence[str] = (), remedy: str = ""
) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names are defined `where`: name -> module below it.

    A name that is its module's own is the module. What was found stays in the package: it is asked for once.
    If one of the libraries it `needs` is missing, the ImportError says the `remedy`.

    Example:
        >>> __getattr__ = names_later(__name__, {"Engine": "engine"})
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f".{where[name]}", package)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in needs:
                raise ImportError(remedy) from error
            raise
        found = module if where[name] == name else getattr(module, name)
        setattr(sys.modules[package], name, found)
        return found

    return get
