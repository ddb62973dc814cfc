"""What a model says about its tasks: names for the logs, ids for the routing.

In:   a model with ALoRA layers, or those of a method it is compared with, and the datasets it will see.
Out:  its task names in the order of their ids, and whether it is routed by them.
Who:  `ALoRATrainer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from ..integrations.peft import ALoRAConfig
from ..modules import FusedALoRALinear
from ..modules.adapted import AdaptedLinear
from ..modules.tasks import task_id


def tasks_of_model(model: nn.Module | None, datasets: Mapping[str, Any]) -> tuple[tuple[str, ...], bool]:
    """Task names and whether ids pick matrices; models that take no ids have names from the data, for logs.

    Args:
        model: a PEFT model, or any module with `FusedALoRALinear`, `HydraLinear` or `PerTaskLinear` layers.
        datasets: by argument name; None where not given.

    Raises:
        ValueError: no such layer, a dataset without a `task` column, or a task the model does not have.
    """
    columns = {name: _task_column(name, dataset) for name, dataset in datasets.items() if dataset is not None}
    tasks = _routed_tasks(model)
    if tasks is None:
        return tuple(sorted({str(task) for column in columns.values() for task in column})), False
    for column in columns.values():
        for task in dict.fromkeys(column):
            task_id(task, tasks)
    return tasks, True


def _task_column(name: str, dataset: Any) -> list[Any]:
    parts = dataset.values() if isinstance(dataset, dict) else [dataset]
    column: list[Any] = []
    for part in parts:
        names = getattr(part, "column_names", None)
        if names is not None and "task" not in names:
            raise ValueError(f"{name} has no `task` column (a name or id per row), only {', '.join(names)}")
        column += list(part["task"]) if names is not None else [row["task"] for row in part]
    return column


def _routed_tasks(model: nn.Module | None) -> tuple[str, ...] | None:
    """Names of a task-routed model, None for a soft-routed one and for a single LoRA."""
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(active, str) else None
    if isinstance(config, ALoRAConfig):
        return tuple(config.tasks) if isinstance(config.tasks, list) else None
    if isinstance(config, PeftConfig):
        return None
    modules = model.modules() if model is not None else []
    layers = [m for m in modules if isinstance(m, FusedALoRALinear | AdaptedLinear)]
    if not layers:
        raise ValueError(
            "the model has no ALoRA layer: wrap it with get_peft_model(model, ALoRAConfig(...)) or put"
            " FusedALoRALinear.from_linear(layer, r, tasks=[...]) in the place of its linear layers"
        )
    return layers[0].tasks or None


def stacked_a(model: Any) -> Iterator[nn.Parameter]:
    """What each task has for itself in a routed model: the stacked A `[E, R, K]`, and B where they are stacked too."""
    for name, parameter in model.named_parameters():
        if ("lora_A" in name or "lora_B" in name) and parameter.dim() == 3:
            yield parameter
