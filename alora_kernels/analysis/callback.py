"""Gradient conflicts while a model trains, from fixed probe batches to a CSV with a row per matrix every n steps."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .gradients import COLUMNS, Conflicts, Loss, Measured, NotFiniteError, task_conflicts, two_tasks
from .table import write_csv

logger = logging.getLogger(__name__)


class ConflictCallback(TrainerCallback):
    """Measure `gradients.task_conflicts` after every n-th optimiser step and append it to a CSV.

    For transformers' Trainer and ours: `trainer.add_callback(ConflictCallback(trainer.compute_loss, ...))`. Training
    with the callback gives bit for bit the weights of training without it.

    Columns: `step`, `module`, `parameter` ("A", "B"), `sharing` ("shared" or "per task"), `norm` (mean over tasks),
    `conflicts`, `pairs`. A measurement costs one forward and backward per task. Gradients that are not finite are named
    in a warning, and that step has no rows. Several processes are refused. `latest` are the records
    of the last measurement, with all cosines.

    Args:
        loss: `(model, batch) -> scalar`; `trainer.compute_loss`.
        batches: task -> batch of at least two, best of held-out rows (`gradients.probe_batches`); the same at every
            step,
            so that a curve shows the model changing and not the data.
        path: of the CSV. A resumed run drops rows after its checkpoint and appends; at a new one's start it is a
            ValueError if the file exists.
        every: steps between measurements, at least 1.
        parameters: as for `gradients.task_gradients`.
    """

    def __init__(
        self,
        loss: Loss,
        batches: Mapping[str, Any],
        path: str | Path,
        *,
        every: int = 50,
        parameters: Sequence[str] | None = None,
    ) -> None:
        two_tasks(batches)
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.loss, self.batches, self.path = loss, dict(batches), Path(path)
        self.every, self.parameters = every, parameters
        self.latest: list[Conflicts] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the file, or cut it back to where a resumed run stands."""
        if args.world_size > 1:
            raise ValueError(
                f"conflicts are measured by one process alone, and these are {args.world_size}: train without them"
                " (conflict_steps: 0), or in one process"
            )
        if not state.is_world_process_zero:
            return
        kept: list[list[str]] = []
        if self.path.exists():
            if state.global_step == 0:
                raise ValueError(f"{self.path} holds an earlier run's rows: delete it or give another path")
            with self.path.open(newline="") as old:
                header, *rows = list(csv.reader(old)) or [[]]
            if tuple(header) != COLUMNS:
                columns = f"its columns are {header}, not {list(COLUMNS)}"
                raise ValueError(f"{self.path} is not a file of conflicts: {columns}")
            # a killed run's last row is cut
            kept = [row for row in rows if len(row) == len(COLUMNS) and int(row[0]) <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(self.path, COLUMNS, kept)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure, if it is time."""
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        try:
            self.latest = task_conflicts(kwargs["model"], self.batches, self.loss, self.parameters)
        except NotFiniteError as error:  # a measurement must not end a training, which may have its own remedy
            logger.warning("step %d: conflicts not measured, %s", state.global_step, error)
            return
        step = state.global_step
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                Measured(step, r.module, r.parameter, r.sharing, r.norm, r.conflicts, r.pairs) for r in self.latest
            )
