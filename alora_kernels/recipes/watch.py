"""What a training says on its way: a bar and lines on the terminal, `losses.csv` as it grows, a picture at the end."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .. import plotting
from ..files import replacing
from . import display

LOSSES, PICTURE = "losses.csv", "losses.png"  # in the output folder
COLUMNS = ("step", "epoch", "split", "task", "loss", "accuracy")
SPLITS = {"train": "", "validation": "eval_"}  # and how their logs begin
LINES = 12  # in a run, beside those of evaluations
SHOWN = 6  # tasks beside the bar


def measured(logs: Mapping[str, float]) -> Iterator[tuple[str, str, float, float | None]]:
    """Split, task, loss and accuracy in one log; the task "" is all of them, in validation the mean over tasks."""
    for split, prefix in SPLITS.items():
        if f"{prefix}loss" not in logs:
            continue
        yield split, "", logs.get(f"{prefix}mean_loss", logs[f"{prefix}loss"]), logs.get(f"{prefix}accuracy")
        for key, loss in logs.items():
            if key.startswith(f"{prefix}loss_"):
                task = key.removeprefix(f"{prefix}loss_")
                yield split, task, loss, logs.get(f"{prefix}accuracy_{task}")


class TrainingBar(TrainerCallback):
    """A bar with the newest losses while training, and lines that stay."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, where training resumes."""
        self.bar = display.progress("steps")
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step, note="")
        self.bar.start()
        self.said = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the losses; the last log of a training has none."""
        found = list(measured(logs))
        if not found:
            return
        split, _, whole, _ = found[0]
        loss = f"{'' if split == 'train' else f'{split} '}loss {whole:.3f}"
        tasks = [f"{task} {value:.2f}" for _, task, value, _ in found[1:]]
        few = "  ".join(tasks[:SHOWN]) + (" ..." if len(tasks) > SHOWN else "")
        self.bar.update(self.task, note=f"{loss}  [dim]{few}[/dim]")
        if split != "train" or state.global_step - self.said >= max(1, state.max_steps // LINES):
            self.said = state.global_step if split == "train" else self.said
            every = "  ".join(tasks)
            self.bar.console.print(f"step {state.global_step:>4}  {loss}  [dim]{every}[/dim]", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the finished bar on the screen."""
        self.bar.stop()


class LossFile(TrainerCallback):
    """Appends every log to a CSV, in whole lines; where training resumes it begins with what the checkpoint knows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what was logged after the checkpoint."""
        if state.is_world_process_zero and state.global_step:
            with replacing(self.path) as part:
                part.write_text(_lines(state.log_history, header=True), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(_lines(state.log_history[-1:], header=not file.tell()))


def _lines(history: Iterable[Mapping[str, Any]], *, header: bool) -> str:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerows([COLUMNS] if header else [])
    for logs in history:
        out.writerows((logs["step"], f"{logs['epoch']:.4f}", *found) for found in measured(logs))
    return text.getvalue()


def draw(losses: Path, picture: Path) -> None:
    """Losses and accuracy of each task over steps, from the file of losses; a line says so where nothing can draw."""
    try:
        plotting.check_matplotlib()
    except ImportError as error:
        display.say(f"no {picture.name}: {error}", "dim")
        return
    if not losses.exists():  # a run shorter than logging_steps
        return
    with losses.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    titles = [(s, m) for s in SPLITS for m in COLUMNS[-2:] if any(row["split"] == s and row[m] for row in rows)]
    if not titles:
        return
    made, axes = plotting.panels(len(titles), len(titles))
    tasks = sorted({row["task"] for row in rows if row["task"]})
    for axis, (split, measure) in zip(axes, titles, strict=True):
        axis.set(title=f"{split}: {measure}", xlabel="step")
        for task, colour in [*zip(tasks, cycle(plotting.COLOURS)), ("", plotting.DARK_GREY)]:
            at = [row for row in rows if (row["split"], row["task"]) == (split, task) and row[measure]]
            style: dict[str, Any] = {"color": colour, "marker": ".", "lw": 1 if task else 2, "ls": "-" if task else ":"}
            axis.plot(
                [int(row["step"]) for row in at], [float(row[measure]) for row in at], **style, label=task or "all"
            )
    if axes:
        axes[0].legend(fontsize=7, frameon=False)
    plotting.save(made, picture)
