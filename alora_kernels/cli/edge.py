"""The edge of the command line: which errors are the input's, how they look, and quiet libraries.

In:   an exception; or nothing.
Out:  an exit with one clear line; libraries that do not print over our bars.
Who:  every command.
"""

from __future__ import annotations

import typer

from ..ops.backend import BackendError

USER_ERRORS = (ValueError, ImportError, OSError, BackendError)  # what bad input raises: one line, no traceback


def fail(error: Exception) -> typer.Exit:
    """One clear line instead of a traceback, for errors that are the input's."""
    typer.secho(f"error: {error}", fg="red", err=True)
    return typer.Exit(2)


def quiet() -> None:
    """Libraries' own bars and notices would tear ours. Called before they are imported."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
