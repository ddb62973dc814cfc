"""What the terminal shows: one console, tables and bars that look alike; progress goes to standard error."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

FIRST = os.environ.get("RANK", "0") == "0"  # of several processes only the first is heard
console = Console(quiet=not FIRST)
err = Console(stderr=True, quiet=not FIRST)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None, *, left: int = 1
) -> Table:
    """A table whose first `left` columns are text and whose others are numbers."""
    out = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        out.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        out.add_row(*row)
    return out


def say(text: str, style: str | None = None) -> None:
    """Text as it is: neither wrapped nor coloured by guess, so that paths and commands can be copied."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def aside() -> Iterator[None]:
    """For the time of a block everything goes to standard error: standard output is a program's."""
    console.stderr = True
    try:
        yield
    finally:
        console.stderr = False


@contextmanager
def silent(asked: bool = True) -> Iterator[None]:
    """For the time of a block nothing is shown but what `result` says."""
    before = console.quiet, err.quiet
    with warnings.catch_warnings():
        if asked:
            console.quiet = err.quiet = True
            warnings.simplefilter("ignore")
        try:
            yield
        finally:
            console.quiet, err.quiet = before


def result(text: str) -> None:
    """The last line of a command, which is said in silence too."""
    console.quiet, before = not FIRST, console.quiet
    say(text)
    console.quiet = before


def progress(unit: str) -> Progress:
    """A progress bar with counts and times."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=err,
    )


def quiet() -> None:
    """Libraries' own bars and notices would tear ours."""
    import sys

    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry of a hub that is not there
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # serving never imports it, which takes a second
    if datasets := sys.modules.get("datasets"):
        datasets.disable_progress_bars()
