"""Losses and hits of each task, added up batch by batch where the model runs.

In:   the task ids of a batch and what its rows scored.
Out:  the loss of each task for the log; loss and accuracy of each task for an evaluation; how many rows had no label.
Who:  `ALoRATrainer`, one for the steps since the last log and one for each evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOSS, LABELS, MEANS, RIGHT, ROWS = range(5)


class TaskSums:
    """Sums over rows by task; rows without a label and rows of the base alone are in none of them.

    Args:
        names: of the tasks, in the order of their ids.

    Attributes:
        rows: rows seen.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.rows = tuple(names), 0
        self._sums = torch.zeros(5, len(self.names), dtype=torch.float64)
        self._unlabelled = torch.zeros((), dtype=torch.long)

    def add(self, task_ids: Tensor, counts: Tensor, losses: Tensor | None, right: Tensor | None) -> None:
        """Add a batch.

        Args:
            task_ids: `[B]`; with an id per token the rows belong to no one task.
            counts: labels of each row `[B]`.
            losses: their sums `[B]`, None where the loss has no rows.
            right: `[B]` whether all first choices are right.
        """
        self.rows += len(counts)
        self._unlabelled = self._unlabelled.to(counts.device) + (counts == 0).sum()
        if losses is None or right is None or task_ids.shape != counts.shape:
            return
        known = (task_ids >= 0) & (counts > 0)
        losses, counts = losses.detach()[known].double(), counts[known].double()
        batch = torch.stack([losses, counts, losses / counts, right[known].double(), torch.ones_like(counts)])
        self._sums = self._sums.to(batch.device).index_add(1, task_ids[known], batch)

    def sum_over(self, accelerator: Any) -> None:
        """Add up the batches of all processes, which must all call this."""
        if accelerator.num_processes > 1:
            self._sums = accelerator.reduce(self._sums.to(accelerator.device), "sum")

    @property
    def unlabelled(self) -> int:
        """Rows whose labels are all masked."""
        return int(self._unlabelled)

    def logs(self) -> dict[str, float]:
        """Mean loss per label of each task that came."""
        columns = zip(self.names, self._sums.T.tolist(), strict=True)
        return {f"loss_{name}": sums[LOSS] / sums[LABELS] for name, sums in columns if sums[LABELS]}

    def metrics(self) -> dict[str, float]:
        """Loss per label and exact-match accuracy of each task, rows alike, and the mean accuracy over tasks."""
        found: dict[str, float] = {}
        for name, sums in zip(self.names, self._sums.T.tolist(), strict=True):
            if sums[ROWS]:
                found[f"loss_{name}"] = sums[MEANS] / sums[ROWS]
                found[f"accuracy_{name}"] = sums[RIGHT] / sums[ROWS]
        each = [value for key, value in found.items() if key.startswith("accuracy_")]
        return {**found, "accuracy": sum(each) / len(each)} if each else {}
