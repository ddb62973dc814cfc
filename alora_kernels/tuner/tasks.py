"""Tasks of a model in memory: `add_task` makes room for one more, `train_only` trains some and leaves the others.

Both come before the optimiser is made. `adapters.tasks` is for saved adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..modules.adapter import seeded_a, task_names
from ..ops.checks import check_whole
from ..text import did_you_mean
from .layer import ALoRALayer, TrainedPart


def add_task(
    model: nn.Module, name: str, *, like: str | None = None, seed: int = 0, adapter_name: str | None = None
) -> None:
    """Give an adapter one more task, behind the others, whose A and ids stay as they are.

    Args:
        model: a PEFT model or a model with injected adapters; changed in place.
        name: of the new task.
        like: begin with the A of this task; None draws A as a layer begins, for which seed and name count: under a
            trained B that changes answers at random until it is trained.
        seed: of that draw.
        adapter_name: which adapter; None is the active one that picks by task.

    Raises:
        ValueError: a name that is taken, no such task or adapter, soft routing, a merged model, or matrices that
            several processes share.

    Example:
        >>> add_task(model, "law", like="trec")
        >>> train_only(model, ["law"])
    """
    adapter, layers, tasks = _adapter(model, adapter_name)
    names, row = task_names([*tasks, name]), None if like is None else _row(like, tasks)
    for layer in layers:
        if layer.merged:
            raise ValueError("a task is merged into the base: call unmerge_adapter() before adding one")
        check_whole(layer.asymlora_A[adapter]._parameters, layer.rows_name)
    for layer in layers:
        held, spec = layer.asymlora_A[adapter], layer.asymlora_spec[adapter]
        old: Any = held.weight
        new = seeded_a(name, str(layer.rows_name), old.shape[1:], seed).to(old) if row is None else old[row]
        held.weight = nn.Parameter(torch.cat([old.detach(), new.detach()[None]]), old.requires_grad)
        layer.asymlora_spec[adapter] = replace(spec, tasks=names, experts=len(names))
    configs: Any = getattr(model, "peft_config", {})
    if adapter in configs:
        configs[adapter].tasks = list(names)


def train_only(
    model: nn.Module, tasks: Sequence[str] | None, *, b: bool = False, adapter_name: str | None = None
) -> None:
    """Train the A of some tasks; those of others stay as they are to the bit, and with a frozen B their answers too.

    Rows of other tasks may be in a batch: no gradient reaches their A. `ALoRATrainer` and `with_tasks` of TRL keep them
    from weight decay and momentum too; put `KeepAbsentTasks` around the optimiser of a loop of your own. It holds until
    it is called again; after loading a model, call it again.

    Args:
        model: a PEFT model or a model with injected adapters.
        tasks: names of those that train; None trains all of them again, and B.
        b: whether B trains as well, which changes what all tasks answer.
        adapter_name: which adapter; None is the active one that picks by task.

    Raises:
        ValueError: no such task or adapter, soft routing, or biases and modules that all tasks share and that train in
            full, unless `b`.
    """
    adapter, layers, known = _adapter(model, adapter_name)
    if isinstance(tasks, str) or (tasks is not None and not tasks):
        raise ValueError(f"tasks must be a list with a name or more, or None for all, got {tasks!r}")
    part = None if tasks is None else TrainedPart(tuple(sorted({_row(task, known) for task in tasks})), b)
    config: Any = getattr(model, "peft_config", {}).get(adapter)
    shared = [
        n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save
    ]
    shared += [f"bias={config.bias!r}"] if getattr(config, "bias", "none") != "none" else []
    if part is not None and shared and not b:
        raise ValueError(
            f"{shared[0]} trains in full and all tasks share it, so others would change too: say b=True if that is"
            " meant, or make the adapter without it"
        )
    for layer in layers:
        layer.train_only(adapter, part)


def trained_part(model: nn.Module) -> TrainedPart | None:
    """What `train_only` said last of an adapter that is active; None where all tasks train."""
    layers = (module for module in model.modules() if isinstance(module, ALoRALayer))
    parts = (layer.asymlora_trained.get(name) for layer in layers for name in layer.active_adapters)
    return next((part for part in parts if part is not None), None)


def _adapter(model: nn.Module, name: str | None) -> tuple[str, list[ALoRALayer], tuple[str, ...]]:
    """An adapter that picks by task, its layers and its tasks."""
    layers = [module for module in model.modules() if isinstance(module, ALoRALayer)]
    tasks = {key: spec.tasks for layer in layers for key, spec in layer.asymlora_spec.items() if not spec.soft}
    active = {key for layer in layers for key in layer.active_adapters}
    names = [key for key in tasks if key == name or (name is None and key in active)]
    if len(names) != 1:
        raise ValueError(
            f"this needs one {'active adapter' if name is None else f'adapter {name!r}'} that picks by task, and the"
            f" model has {', '.join(tasks) or 'none (soft routing has no tasks)'}: say which by adapter_name"
        )
    return names[0], [layer for layer in layers if names[0] in layer.asymlora_spec], tasks[names[0]]


def _row(task: str, tasks: Sequence[str]) -> int:
    if task not in tasks:
        raise ValueError(f"unknown task {task!r}: {did_you_mean(str(task), tasks)}")
    return list(tasks).index(task)
