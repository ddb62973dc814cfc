"""`set_task`: one task for every call that does not name any.

In:   a PEFT model, or any model with injected ALoRA layers, and a task of its active adapters.
Out:  the task kept on each layer until it is changed or cleared.
Who:  users, before single-task inference and before a merge.
"""

from __future__ import annotations

from torch import nn

from ..modules.tasks import BASE, task_id
from .layer import ALoRALayer


def set_task(model: nn.Module, task: str | int | None, adapter_name: str | None = None) -> None:
    """Choose the task for calls without ids, and the one that a merge takes.

    `adapter_names` and `alora_kernels.route` still win over it.

    Args:
        model: a PEFT model or a model with injected adapters.
        task: name or id; "__base__" is the base alone; None clears the choice.
        adapter_name: which adapter; None means every active adapter that knows the task.

    Raises:
        ValueError: no ALoRA layer, an unknown adapter or task, a soft-routed adapter, or a merged model.

    Example:
        >>> alora_kernels.set_task(model, "math")
        >>> model.merge_and_unload()
    """
    layers: list[ALoRALayer] = [module for module in model.modules() if isinstance(module, ALoRALayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no ALoRA layers: add an adapter with get_peft_model first")
    if any(layer.merged for layer in layers):
        raise ValueError("a task is merged into the base: call unmerge_adapter() before choosing another")
    tasks = {n: s.tasks for layer in layers for n, s in layer.asymlora_spec.items()}
    chosen = _chosen(layers, tasks, task, adapter_name)
    for layer in layers:
        for name in chosen:
            if name not in layer.asymlora_spec:
                continue
            if task is None:
                layer.asymlora_fixed.pop(name, None)
            else:
                layer.asymlora_fixed[name] = task_id(task, tasks[name])


def _chosen(
    layers: list[ALoRALayer], tasks: dict[str, tuple[str, ...]], task: str | int | None, adapter_name: str | None
) -> list[str]:
    """The adapters that the choice is for."""
    if adapter_name is not None and adapter_name not in tasks:
        raise ValueError(f"unknown adapter {adapter_name!r}: the model has {', '.join(tasks)}")
    active = list(dict.fromkeys(n for layer in layers for n in layer.active_adapters if n in tasks))
    names = [adapter_name] if adapter_name is not None else active
    routed = [name for name in names if tasks[name]]
    if not names:
        raise ValueError("no ALoRA adapter is active: choose one with set_adapter")
    if not routed:
        raise ValueError(f"{', '.join(names)} has no tasks: its router chooses by itself")
    if task is None:
        return routed
    fitting = [name for name in routed if _knows(task, tasks[name])]
    if not fitting:
        known = list(dict.fromkeys(t for name in routed for t in tasks[name]))
        raise ValueError(f"unknown task {task!r}: valid tasks are {', '.join(known)} and {BASE} (the base model alone)")
    return fitting


def _knows(task: str | int, tasks: tuple[str, ...]) -> bool:
    try:
        task_id(task, tasks)
    except ValueError:
        return False
    return True
