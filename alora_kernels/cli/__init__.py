"""The command line: `app` holds the commands, recipes do the work; here is how each of them begins and fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from .. import recipes as recipes  # first of all: it keeps bitsandbytes quiet
from ..ops.dispatch import BackendError
from ..recipes.display import quiet

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


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
    import torch

    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
