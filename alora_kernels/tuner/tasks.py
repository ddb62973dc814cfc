"""Tasks of a model in memory: `add_task` makes room for one more, `train_only` trains some and leaves the others.

`adapters.tasks` does the same to saved adapters. Both calls come before the optimiser is made.
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
from ..settings import did_you_mean
from .config import unwrapped
from .layer import ALoRALayer, TrainedPart

Layers = dict[str, ALoRALayer]  # by name in the model


def add_task(
    model: nn.Module, name: str, *, like: str | None = None, seed: int = 0, adapter_name: str | None = None
) -> None:
    """Give an adapter one more task, behind the others, whose A and ids stay as they are.

    Args:
        model: a PEFT model or a model with injected adapters; changed in place.
        name: of the new task.
        like: begin with the A of this task; None draws A as a layer begins: under a trained B that changes answers at
            random until it is trained.
        seed: of that draw, for which the name counts too.
        adapter_name: which adapter; None is the active one that picks by task.

    Raises:
        ValueError: a name that is taken, no such task or adapter, soft routing, a merged model, or matrices that
            several processes share.

    Example:
        >>> add_task(model, "law", like="trec")
        >>> train_only(model, ["law"])
    """
    adapter, layers, tasks = _adapter(model, adapter_name)
    if name in tasks:
        raise ValueError(f"adapter {adapter!r} has a task {name!r} already: choose another name")
    names = task_names([*tasks, name])
    row = None if like is None else _row(like, tasks)
    for layer in layers.values():
        if layer.merged:
            raise ValueError("a task is merged into the base: call unmerge_adapter() before adding one")
        check_whole(layer.asymlora_A[adapter]._parameters, layer.rows_name)
    for module, layer in layers.items():
        weight = layer.asymlora_A[adapter]
        old: Any = weight.weight
        new = old[row] if row is not None else seeded_a(name, module, old.shape[1], old.shape[2], seed).to(old)
        weight.weight = nn.Parameter(torch.cat([old.detach(), new.detach()[None]]), old.requires_grad)
        spec = layer.asymlora_spec[adapter]
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

    Example:
        >>> train_only(model, ["law"])
        >>> ALoRATrainer(model=model, args=args, train_dataset=rows).train()
    """
    adapter, layers, known = _adapter(model, adapter_name)
    if isinstance(tasks, str) or (tasks is not None and not tasks):
        raise ValueError(f"tasks must be a list with a name or more, or None for all, got {tasks!r}")
    part = None if tasks is None else TrainedPart(tuple(sorted({_row(task, known) for task in tasks})), b)
    if part is not None and not b:
        _check_nothing_else_is_shared(model, adapter)
    for layer in layers.values():
        layer.train_only(adapter, part)


def trained_part(model: nn.Module) -> TrainedPart | None:
    """What `train_only` said last of an adapter that is active; None where all tasks train."""
    found = (part for m in model.modules() if isinstance(m, ALoRALayer) for part in m.trained_parts())
    return next(found, None)


def _adapter(model: nn.Module, name: str | None) -> tuple[str, Layers, tuple[str, ...]]:
    """An adapter that picks by task, its layers and its tasks."""
    layers = {unwrapped(m.rows_name or n): m for n, m in model.named_modules() if isinstance(m, ALoRALayer)}
    specs = {key: spec for layer in layers.values() for key, spec in layer.asymlora_spec.items()}
    active = list(dict.fromkeys(key for layer in layers.values() for key in layer.active_adapters if key in specs))
    names = [key for key in (active if name is None else [name]) if key in specs and not specs[key].soft]
    if len(names) != 1:
        have = ", ".join(f"{key} ({'soft routing' if spec.soft else 'tasks'})" for key, spec in specs.items())
        asked = "one active adapter that picks by task" if name is None else f"adapter {name!r} to pick by task"
        raise ValueError(f"this needs {asked}: the model has {have or 'no ALoRA adapter'}; say which by adapter_name")
    (adapter,) = names
    return adapter, {n: m for n, m in layers.items() if adapter in m.asymlora_spec}, specs[adapter].tasks


def _row(task: str, tasks: Sequence[str]) -> int:
    if task not in tasks:
        raise ValueError(f"unknown task {task!r}: {did_you_mean(str(task), tasks)}")
    return list(tasks).index(task)


def _check_nothing_else_is_shared(model: nn.Module, adapter: str) -> None:
    config: Any = getattr(model, "peft_config", {}).get(adapter)
    heads = [
        n for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save
    ]
    biases = getattr(config, "bias", "none")
    if heads or biases != "none":
        what = heads[0] if heads else f"bias={biases!r}"
        raise ValueError(f"{what} trains in full and all tasks share it, so others would change too: say b=True if that"
                         " is meant, or make the adapter without it")  # fmt: skip
