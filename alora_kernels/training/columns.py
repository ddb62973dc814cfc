"""What a dataset says about its tasks, without reading rows that are costly to make.

In:   anything a DataLoader takes: datasets.Dataset, lists of mappings, torch datasets, streams.
Out:  the column of tasks where there is one, checked against the model's names before training.
Who:  `ALoRATrainer`, for its sampler, its checks and the names in the logs of models that take no ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from ..modules.tasks import BASE, plain_task, task_id
from .tasks import Tables, batch_routing


def task_column(name: str, dataset: Any, *, read_rows: bool = False) -> list[Any] | None:
    """The task of every row, as Python values; None where that takes reading all rows or cannot be known.

    Args:
        name: the argument's name, for errors.
        dataset: anything a DataLoader takes.
        read_rows: read them nevertheless where there is random access.

    Raises:
        ValueError: no `task`, or rows that are no mappings.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [task_column(name, part, read_rows=read_rows) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [task for part in parts for task in part or ()]
    if isinstance(dataset, Subset):
        whole = task_column(name, dataset.dataset, read_rows=read_rows)
        return None if whole is None else [whole[i] for i in dataset.indices]
    columns = getattr(dataset, "column_names", None)
    computed = getattr(dataset, "format", {}).get("type") == "custom" if columns is not None else False
    if columns is not None and not computed and "task" not in columns:
        raise ValueError(f"{name} has no `task` column (a name or id per row), only {', '.join(columns)}")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    if columns is not None and not computed:
        return [plain_task(task) for task in dataset.with_format(None)["task"]]
    if len(dataset) == 0:
        return []
    if not isinstance(dataset, list | tuple) and not read_rows:
        _task_of(name, dataset[0])
        return None
    return [_task_of(name, dataset[i]) for i in range(len(dataset))]


def _task_of(name: str, row: Any) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row of {name} is a {type(row).__name__}: give mappings with `input_ids`, `labels`, `task`")
    if "task" not in row:
        raise ValueError(f"{name} has no `task` column (a name or id per row), only {', '.join(row)}")
    return plain_task(row["task"])


def check_dataset(name: str, dataset: Any, names: Sequence[str], tables: Tables) -> None:
    """Raise unless the dataset's tasks are known to an active adapter, as far as that can be told before training.

    Args:
        name: the argument's name.
        dataset: one dataset, or several by name for an evaluation; None is fine.
        names: what ids count.
        tables: of `active_tables`.

    Raises:
        ValueError: naming the dataset and what is missing.
    """
    parts = dataset.values() if isinstance(dataset, Mapping) else [] if dataset is None else [dataset]
    for part in parts:
        check_class_label(name, part, names)
        for task in dict.fromkeys(task_column(name, part) or ()):
            index = task_id(task, names)
            if index >= 0 and not any(names[index] in table for table in tables.values()):
                batch_routing(torch.tensor([index]), names, tables)  # says so


def check_class_label(name: str, dataset: Any, names: Sequence[str]) -> None:
    """Raise unless a column of class numbers, which has names of its own, counts as the model does.

    Raises:
        ValueError: with both lists.
    """
    inside = dataset.datasets if isinstance(dataset, ConcatDataset) else []
    for part in [dataset.dataset] if isinstance(dataset, Subset) else inside:
        check_class_label(name, part, names)
    meant = getattr((getattr(dataset, "features", None) or {}).get("task"), "names", None)
    if meant is not None and tuple(meant) != tuple(names)[: len(meant)]:
        raise ValueError(
            f"the numbers in the `task` column of {name} mean {', '.join(meant)}, but the model's tasks are"
            f" {', '.join(names)}: turn them into names (dataset.features['task'].int2str)"
        )


def check_order(dataset: Any, strategy: str, temperature: float) -> None:
    """Raise unless the training set can be read in the order that is asked for.

    Args:
        dataset: the training set, or None.
        strategy: `TrainingArguments.train_sampling_strategy`.
        temperature: of the tasks; 1 leaves their shares as they are.

    Raises:
        ValueError: several datasets, a temperature with an order that is not random, an order asked of a stream.
    """
    if isinstance(dataset, Mapping):
        raise ValueError(f"train_dataset holds {', '.join(map(str, dataset))}: pass one of them, or join them")
    stream = isinstance(dataset, IterableDataset)
    if temperature != 1.0 and (stream or strategy != "random"):
        reason = "a stream has its own order" if stream else f"train_sampling_strategy is {strategy!r}"
        raise ValueError(
            f"task_temperature={temperature} draws rows task by task, but {reason}: leave it at 1"
            + ("; datasets.interleave_datasets(probabilities=...) mixes streams" if stream else "")
        )
    if stream and strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={strategy!r} needs a dataset with random access, and train_dataset is a stream:"
            " leave the argument out, or sort before streaming"
        )


def names_in(datasets: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Task names from the data, for the logs of a model that takes no ids; None where a dataset does not tell."""
    found: set[str] = set()
    for name, dataset in datasets.items():
        for part in dataset.values() if isinstance(dataset, Mapping) else [] if dataset is None else [dataset]:
            column = task_column(name, part)
            if column is None:
                return None
            numbers = [task for task in column if isinstance(task, int)]
            found.update(str(i) for i in range(max(numbers, default=-1) + 1))
            found.update(task for task in column if isinstance(task, str) and task != BASE)
    return tuple(sorted(found, key=lambda task: (not task.isdigit(), int(task) if task.isdigit() else 0, task)))
