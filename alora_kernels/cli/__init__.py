"""The command line: `app` holds the commands, recipes do the work; here is how each of them begins and fails."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from .. import recipes as recipes  # first of all: it keeps bitsandbytes quiet
from ..ops.dispatch import BackendError
from ..precision import AUTO, DTYPES
from ..recipes.display import quiet

if TYPE_CHECKING:
    import torch

WISHES = (AUTO, *DTYPES)


@contextmanager
def command(*errors: type[Exception]) -> Iterator[None]:
    """A command's work: libraries are quiet; bad input and these errors are one line, no traceback, exit code 2."""
    quiet()
    shown: tuple[type[Exception], ...] = (ValueError, ImportError, OSError, BackendError, *errors)
    try:
        yield
    except shown as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from error


def dtype_of(name: str) -> torch.dtype:
    """What `--dtype` names."""
    return DTYPES[_known(name, DTYPES)]


def wish_of(name: str) -> str:
    """What `--dtype` of a base names: `auto` too."""
    return _known(name, WISHES)


def _known(name: str, names: Collection[str]) -> str:
    if name not in names:
        raise ValueError(f"--dtype must be one of {', '.join(names)}, got {name!r}")
    return name
