"""The command line: `app` holds the commands, recipes do the work; here is how each of them begins and fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from .. import recipes as recipes  # first of all: it keeps bitsandbytes quiet
from ..dtypes import AUTO, DTYPE_NAMES, TRAINED, check_dtype
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

    check_dtype(name, DTYPE_NAMES, "--dtype")
    return DTYPES[name]


def wish_of(name: str) -> str:
    """What `--dtype` of a base that serves names: `auto` too."""
    check_dtype(name, WISHES, "--dtype")
    return name


def trained_in(name: str | None) -> str | None:
    """What `--dtype` of a base that is trained on names, if it was given."""
    if name is not None:
        check_dtype(name, TRAINED, "--dtype")
    return name
