"""What the terminal shows: one console, tables that look alike, a progress bar for training.

For recipes, the command line, examples and benchmarks. Progress goes to standard error, so that piped output stays
clean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

console = Console()
err = Console(stderr=True)


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


class TrainingBar(TrainerCallback):
    """Steps, times and the loss while training; the loss of each task line by line."""

    def __init__(self) -> None:
        self.bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, where training resumes."""
        self.bar = progress("steps")
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """The loss on the bar, and a line with the loss of each task above it."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        per_task = "  ".join(f"{k[5:]} {v:.2f}" for k, v in logs.items() if k.startswith("loss_"))
        loss = f"loss {logs['loss']:.3f}"
        self.bar.update(self.task, note=loss)
        self.bar.console.print(f"step {state.global_step:>4}  {loss}  [dim]{per_task}[/dim]", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def quiet() -> None:
    """Libraries' own bars and notices would tear ours. Called before they are imported."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
