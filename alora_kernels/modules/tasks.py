"""Task names: the words users write and the ids that kernels read.

In:   a layer's tasks as a count or a list of names, and what a caller says about the rows of a batch.
Out:  unique names, and integer ids; `"__base__"` is -1, the base model alone.
Who:  `FusedALoRALinear`, the PEFT tuner, the trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

BASE = "__base__"


def task_names(tasks: int | Sequence[str]) -> tuple[str, ...]:
    """Unique task names; a count n gives "0" .. "n - 1".

    Raises:
        TypeError: a name is not a string.
        ValueError: no task, a repeated name, or the reserved "__base__".
    """
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a list of names or a count, got the string {tasks!r}: use [{tasks!r}]")
    names = tuple(str(i) for i in range(tasks)) if isinstance(tasks, int) else tuple(tasks)
    if not names:
        raise ValueError("an ALoRA layer needs at least one task")
    if any(not isinstance(name, str) for name in names):
        raise TypeError(f"task names must be strings, got {names}")
    if len(set(names)) != len(names) or BASE in names:
        raise ValueError(f"task names must be unique and not {BASE!r} (reserved for the base model), got {names}")
    return names


def task_id(task: Any, tasks: Sequence[str]) -> int:
    """The id of one task, by name or id; `"__base__"` and -1 give -1.

    Args:
        task: a name or an integer, also as NumPy or torch give one number of an array.
        tasks: names in the order of their ids.

    Raises:
        ValueError: no such task; the valid ones are listed.
    """
    task = plain_task(task)
    if isinstance(task, str) and (task == BASE or task in tasks):
        return -1 if task == BASE else list(tasks).index(task)
    if isinstance(task, int) and not isinstance(task, bool) and -1 <= task < len(tasks):
        return task
    raise ValueError(f"unknown task {task!r}: valid tasks are {', '.join(tasks)} and {BASE} (the base model alone)")


def plain_task(task: Any) -> Any:
    """A task as a Python string or integer, so that equal tasks are equal keys; other values are left as they are."""
    if getattr(task, "ndim", None) == 0:  # NumPy scalars, and arrays and tensors of one number
        task = task.item()
    return int(task) if isinstance(task, Integral) and not isinstance(task, bool) else task


def task_ids_from_names(names: Sequence[Any], tasks: Sequence[str]) -> Tensor:
    """Ids `[len(names)]` of the tasks named, int64 on the CPU.

    Raises:
        ValueError: an unknown task; the valid ones are listed.
    """
    return torch.tensor([task_id(name, tasks) for name in names], dtype=torch.long)
