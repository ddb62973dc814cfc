"""The command line: `app` holds the commands, recipes do the work; here is how each of them begins and fails."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from .. import recipes as recipes  # first of all: it keeps bitsandbytes quiet
from ..dtypes import AUTO, DTYPE_NAMES
from ..recipes.display import quiet

if TYPE_CHECKING:
    import torch

WISHES = (AUTO, *DTYPE_NAMES)


@contextmanager
def command(*errors: type[Exception]) -> Iterator[None]:
    """A command's work: libraries are quiet; bad input and these errors are one line, no traceback, exit code 2."""
    quiet()
    shown: tuple[type[Exception], ...] = (ValueError, ImportError, OSError, *errors)
    try:
        yield
    except shown as error:
        raise _refused(error) from error
    except RuntimeError as error:
        from ..ops.dispatch import BackendError

        if not isinstance(error, BackendError):
            raise
        raise _refused(error) from error


def _refused(error: Exception) -> typer.Exit:
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(2)


def dtype_of(name: str) -> torch.dtype:
    """What `--dtype` names."""
    from ..precision import DTYPES

    return DTYPES[_known(name, DTYPE_NAMES)]


def wish_of(name: str) -> str:
    """What `--dtype` of a base names: `auto` too."""
    return _known(name, WISHES)


def _known(name: str, names: Collection[str]) -> str:
    if name not in names:
        raise ValueError(f"--dtype must be one of {', '.join(names)}, got {name!r}")
    return name
