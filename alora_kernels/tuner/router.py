"""From what a call says about its rows to the ids that each layer reads.

`ALoRAModel` routes a forward or `generate` call by its `adapter_names` (`BatchRouting`) and hooks the base model
(`CheckpointGuard`, which the trainer installs too); `set_task` keeps a task on the layers for all calls.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..modules.adapter import BASE, task_id
from ..recompute import keep_routing
from ..routing import Layout, Routing, current_routing
from .layer import ALoRALayer
from .probe import parameters_of, probe_call

TEXT = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids", "decoder_inputs_embeds")
INPUTS = (*TEXT, "encoder_outputs", "input_features", "input_values", "pixel_values")  # whose rows are the batch's
#: what `probe_call` finds besides layouts -> the layout it stands for
UNCLEAR: dict[Any, Layout | None] = {"shared": "mixed", "several": None, "uncalled": None, "unreached": None}


class TableRouting(Routing):
    """Ids of one batch by the table of tasks that an adapter has; `task_ids` alone where all count alike."""

    kept = (*Routing.kept, "_resolved")

    def __init__(self, task_ids: Tensor, by_table: Mapping[tuple[str, ...], Tensor]) -> None:
        super().__init__(task_ids)
        self._resolved = {tasks: Routing(ids) for tasks, ids in by_table.items()}
        for tasks, routing in self._resolved.items():
            routing._checked.add(len(tasks))  # made from names: all in range

    def for_tasks(self, tasks: tuple[str, ...]) -> Routing:
        """The ids of this batch for an adapter with these tasks."""
        if not self._resolved:
            return self
        self._resolved[tasks].one_row = self.one_row
        return self._resolved[tasks]

    def in_graph(self) -> Routing:
        """As `Routing.in_graph`, for every adapter."""
        return self._with(_shared=[], _resolved={tasks: one.in_graph() for tasks, one in self._resolved.items()})

    def repeated(self, repeats: int) -> Routing:
        """As `Routing.repeated`, for every adapter."""
        other: Any = super().repeated(repeats)
        other._resolved = {tasks: one.repeated(repeats) for tasks, one in self._resolved.items()}
        return other  # type: ignore[no-any-return]


class BatchRouting(TableRouting):
    """The `adapter_names` of one call: one task name or id per row, or an integer tensor (per row or per token).

    `tasks` are those of each active adapter. A row whose task one of them does not know gets nothing from that adapter;
    a name that none knows is a ValueError, other kinds of `names` are a TypeError.
    """

    given_as = "adapter_names"

    def __init__(self, names: Sequence[str | int] | Tensor, tasks: Mapping[str, Sequence[str]]) -> None:
        if isinstance(names, Tensor):
            if names.is_floating_point() or names.is_complex() or names.dtype == torch.bool:
                raise TypeError(f"adapter_names must be task names or an integer tensor, got {names.dtype}")
            super().__init__(names, {})
            return
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(
                f"adapter_names must be a list with one task name per row, or an integer tensor, got {names!r}"
            )
        known = list(dict.fromkeys(task for group in tasks.values() for task in group))
        for name in names:
            if isinstance(name, str) and name != BASE and name not in known:
                text = f"unknown task {name!r}: valid tasks are {', '.join(known)} and {BASE} (the base model alone)"
                raise ValueError(
                    text + (f"; {name!r} is an adapter: choose it with set_adapter" if name in tasks else "")
                )
        by_table = {tuple(group): _ids(names, tuple(group)) for group in tasks.values()}
        super().__init__(next(iter(by_table.values())), by_table)


def _ids(names: Sequence[Any], tasks: tuple[str, ...]) -> Tensor:
    """Ids `[len(names)]` for one adapter; names that it does not know, but another does, are the base."""
    known = {task: i for i, task in enumerate(tasks)}
    ids = [known.get(name, -1) if isinstance(name, str) else task_id(name, tasks) for name in names]
    return torch.tensor(ids, dtype=torch.long)


def batch_shape(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """(rows, tokens) of the batch that a model is called with; None if no argument tells, tokens None if it is no text.

    A vision-language model's images are not its rows, so names decide; of a model that uses none of `INPUTS`, its first
    tensor is the batch, also inside of a dict, list or tuple. `names` are for the positional arguments.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
        nested = isinstance(value, Mapping | list | tuple) and (key not in INPUTS or key == "encoder_outputs")
        for leaf in tree_leaves(dict(value) if isinstance(value, Mapping) else value) if nested else [value]:
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                tensors.setdefault(key, leaf)
    name = next((name for name in (*INPUTS, *tensors) if name in tensors), None)
    if name is None:
        return None
    shape = tensors[name].shape[:-1] if tensors[name].is_floating_point() else tensors[name].shape
    return tensors[name].shape[0], shape.numel() if name in TEXT or name not in INPUTS else None


def beams(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How many consecutive rows `model.generate(**kwargs)` makes of each row of its batch."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    wanted = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    twice = hasattr(model, "_expand_variables_for_generation")  # Whisper repeats its rows by both
    return math.prod(wanted) if twice else max(wanted)


class RoutedCheckpoint:
    """A checkpoint function of transformers, `function(segment, *args)`, that keeps the routing; never reentrant."""

    def __init__(self, function: Callable[..., Any]) -> None:
        given = function.keywords if isinstance(function, functools.partial) else {}
        if given.get("use_reentrant"):
            raise ValueError(
                "reentrant activation checkpointing loses adapter gradients where no input requires one: use"
                ' gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}), or the same'
                " gradient_checkpointing_kwargs in TrainingArguments"
            )
        plain = isinstance(function, functools.partial) or function is torch.utils.checkpoint.checkpoint
        if plain and "use_reentrant" not in given:  # torch's default is still the reentrant kind
            function = functools.partial(function, use_reentrant=False)
        self.function = function

    @torch.compiler.disable  # a compiler can follow neither contexts nor what a layer notes in them
    def __call__(self, segment: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the checkpoint over a segment that remembers its routing."""
        return self.function(keep_routing(segment), *args, **kwargs)


class CheckpointGuard:
    """Forward pre-hook of the base model: ids must fit its batch, and every checkpoint runs through `keep_routing`."""

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.parameters = parameters_of(model)
        self.unknown: dict[str, ALoRALayer] | None = None  # layers of which nobody knows where the rows are

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names is an argument of the model that get_peft_model returns; call this model inside"
                " `with alora_kernels.route(ids):`, or fix one task with alora_kernels.set_task(model, task)"
            )
        routing = current_routing()
        shape = None if routing is None else batch_shape(self.parameters, args, kwargs)
        if routing is not None and shape is not None:
            routing.check_batch(*shape)
            if not torch.compiler.is_compiling() and self.unknown != {}:
                self._learn_rows(model, args, kwargs, shape[0])
        for module in self.modules:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, "_gradient_checkpointing_func", None)
                if function is not None and not isinstance(function, RoutedCheckpoint):
                    module._gradient_checkpointing_func = RoutedCheckpoint(function)

    def _learn_rows(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rows: int) -> None:
        """Find out where rows are in layers that could not be tried at injection, from the first batch that tells."""
        if self.unknown is None:
            self.unknown = {n: m for n, m in model.named_modules() if isinstance(m, ALoRALayer) and m.rows is None}
        # processes that hold parts of a model must not run it one without the others
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        findings = {} if together or not self.unknown else probe_call(model, args, kwargs, rows, self.unknown)
        if findings is None:
            return
        for name, layer in self.unknown.items():
            finding: Any = findings.get(name)
            layer.rows = UNCLEAR.get(finding, finding)
        self.unknown = {}

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Hook the model, once; an adapter that was added may have layers of which nothing is known yet."""
        hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, cls)]
        for hook in hooks:
            hook.unknown = None
        if not hooks:
            model.register_forward_pre_hook(cls(model), with_kwargs=True)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Give the model back as it was."""
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, cls):
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
                for module in hook.modules:
                    function = getattr(module, "_gradient_checkpointing_func", None)
                    if isinstance(function, RoutedCheckpoint):
                        module._gradient_checkpointing_func = function.function


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
    chosen = _chosen(layers, task, adapter_name)
    for layer in layers:
        for name in chosen.keys() & layer.asymlora_spec.keys():
            if task is None:
                layer.asymlora_fixed.pop(name, None)
            else:
                layer.asymlora_fixed[name] = chosen[name]


def _chosen(layers: list[ALoRALayer], task: str | int | None, adapter_name: str | None) -> dict[str, int]:
    """The adapters that the choice is for, and the number of the task in each."""
    tasks = {n: s.tasks for layer in layers for n, s in layer.asymlora_spec.items()}
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
        return dict.fromkeys(routed, -1)
    chosen: dict[str, int] = {}
    for name in routed:
        with contextlib.suppress(ValueError):  # an adapter that does not know the task is not meant
            chosen[name] = task_id(task, tasks[name])
    if not chosen:
        known = list(dict.fromkeys(t for name in routed for t in tasks[name]))
        raise ValueError(f"unknown task {task!r}: valid tasks are {', '.join(known)} and {BASE} (the base model alone)")
    return chosen
