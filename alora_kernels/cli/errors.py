"""Which errors are the input's, and how every command shows them: one clear line and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..ops.dispatch import BackendError

USER_ERRORS = (ValueError, ImportError, OSError, BackendError)  # what bad input raises: one line, no traceback


def fail(error: Exception) -> typer.Exit:
    """One clear line instead of a traceback, for errors that are the input's."""
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(2)


@contextmanager
def one_line(*more: type[Exception]) -> Iterator[None]:
    """The block's errors that are the input's, and those named here, become one line and exit code 2."""
    errors: tuple[type[Exception], ...] = (*USER_ERRORS, *more)
    try:
        yield
    except errors as error:
        raise fail(error) from error
