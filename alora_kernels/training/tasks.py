"""What a model says about its tasks: names for the logs, ids for the routing.

In:   a model with ALoRA layers, or those of a method it is compared with; the ids of a batch.
Out:  the task names of every active adapter, and the routing of a batch, by names.
Who:  `ALoRATrainer`.

The numbers in a batch count the names of one table, the collator's. Which adapter is active, and in which order it has
its tasks, may change after the collator was made, so each batch is routed by the names its numbers stand for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..modules import FusedALoRALinear
from ..modules.adapter import AdaptedLinear
from ..routing import Routing
from ..tuner.ids import BatchRouting
from ..tuner.layer import ALoRALayer

Tables = dict[str, tuple[str, ...]]
DROP_IN = ""  # drop-in layers have one table and no adapter's name
NOT_KNOWN = -2
PER_ROW = ("input_ids", "labels", "task_ids", "decoder_input_ids", "decoder_attention_mask")
PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids")  # one entry per row in the shape of input_ids


def task_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that may be routed by ids."""
    kinds = (ALoRALayer, FusedALoRALinear, AdaptedLinear)
    return [module for module in model.modules() if isinstance(module, kinds)]


def active_tables(layers: Iterable[nn.Module]) -> Tables:
    """Adapter -> its task names, for each active adapter that picks matrices by ids; `DROP_IN` for drop-in layers.

    Args:
        layers: of `task_layers`; which of their adapters are active is asked at every call.

    Raises:
        ValueError: drop-in layers with different tasks.
    """
    tables: Tables = {}
    for module in layers:
        if isinstance(module, ALoRALayer):
            specs = module.asymlora_spec
            tables.update({n: specs[n].tasks for n in module.active_adapters if n in specs and specs[n].tasks})
            continue
        tasks = module.tasks if isinstance(module, FusedALoRALinear | AdaptedLinear) else ()
        if tasks and tables.setdefault(DROP_IN, tasks) != tasks:
            raise ValueError(
                f"some layers have the tasks {', '.join(tables[DROP_IN])}, others {', '.join(tasks)}: a batch has one"
                " id per row, so give all layers the same tasks in the same order"
            )
    return tables


def names_of(tables: Tables) -> tuple[str, ...]:
    """All names, those of the first adapter first."""
    return tuple(dict.fromkeys(name for table in tables.values() for name in table))


def check_adapted(model: nn.Module) -> None:
    """Raise unless the model has something to train for tasks: ALoRA layers, or any PEFT adapter.

    Raises:
        ValueError: with the remedy.
    """
    kinds = (FusedALoRALinear, AdaptedLinear, BaseTunerLayer)
    if not getattr(model, "peft_config", None) and not any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(
            "the model has no ALoRA layer: wrap it with get_peft_model(model, ALoRAConfig(...)), add an adapter with"
            " model.add_adapter(ALoRAConfig(...)), or put FusedALoRALinear.from_linear(layer, r, tasks=[...]) in the"
            " place of its linear layers"
        )


def batch_routing(task_ids: Tensor, names: Sequence[str], tables: Tables) -> Routing:
    """The routing of a batch whose ids count `names`, for every active adapter.

    Args:
        task_ids: per row or per token; -1 is the base alone.
        names: what the ids count.
        tables: of `active_tables`, at least one.

    Raises:
        ValueError: a row's task is known to no active adapter.
    """
    if all(table[: len(names)] == tuple(names) for table in tables.values()):
        return Routing(task_ids)
    return NamedRouting(task_ids, names, tables)


class NamedRouting(BatchRouting):
    """Ids of one table of names, looked up in that of each adapter; one without a row's task adds nothing to the row.

    Args:
        task_ids, names, tables: as `batch_routing`.
    """

    given_as = "task_ids"

    def __init__(self, task_ids: Tensor, names: Sequence[str], tables: Tables) -> None:
        self._tables = {table: self._looked_up(task_ids, names, table) for table in tables.values()}
        unknown = torch.stack([ids == NOT_KNOWN for ids in self._tables.values()]).all(0)
        if unknown.any():
            strangers = sorted({names[i] for i in task_ids[unknown].tolist()})
            known = "; ".join(f"{name or 'the layers'}: {', '.join(table)}" for name, table in tables.items())
            raise ValueError(f"no active adapter has the task {', '.join(strangers)}. Active are {known}")
        first = tables.get(DROP_IN, next(iter(tables.values())))
        super().__init__(self._ids_of(first), tables)

    @staticmethod
    def _looked_up(task_ids: Tensor, names: Sequence[str], table: tuple[str, ...]) -> Tensor:
        places = [table.index(name) if name in table else NOT_KNOWN for name in names]
        return torch.tensor([*places, -1], device=task_ids.device)[task_ids]  # id -1 is the last place

    def _ids_of(self, table: tuple[str, ...]) -> Tensor:
        return self._tables[table].clamp_min(-1)

    def for_tasks(self, tasks: tuple[str, ...]) -> Routing:
        """The ids of this batch for an adapter with these tasks."""
        if tasks not in self._resolved:
            self._resolved[tasks] = Routing(self._ids_of(tasks), self.repeats)
        return self._resolved[tasks]


def stacked_a(model: nn.Module) -> Iterator[nn.Parameter]:
    """What each task has for itself in a routed model: the stacked A `[E, R, K]`, and B where they are stacked too."""
    for module in model.modules():
        if isinstance(module, ALoRALayer):
            routed = {name for name, spec in module.asymlora_spec.items() if spec.tasks}
            mine = [(name, p) for name, p in module.named_parameters() if routed & set(name.split("."))]
        elif isinstance(module, FusedALoRALinear | AdaptedLinear) and module.tasks:
            mine = list(module.named_parameters())
        else:
            continue
        yield from (p for name, p in mine if ("lora_A" in name or "lora_B" in name) and p.dim() == 3)


def side_by_side(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same batch, rows of a task next to each other: one product per task instead of one per row.

    The sum of the losses does not depend on the order of rows; a training step of SmolLM2 on a CPU is 4 % shorter. A
    batch that holds anything else than tensors known to have one entry per row, such as images, keeps its order.
    """
    task_ids = inputs.get("task_ids")
    if not isinstance(task_ids, Tensor) or task_ids.dim() != 1 or not all_per_row(inputs):
        return inputs  # packed rows have an id per token
    order = task_ids.argsort(stable=True)
    return {name: value[order] for name, value in inputs.items()}


def all_per_row(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch holds nothing but tensors that are known to have one entry per row."""
    input_ids = inputs.get("input_ids")
    if not isinstance(input_ids, Tensor):
        return False

    def is_per_row(name: str, value: Any) -> bool:
        if not isinstance(value, Tensor) or value.shape[:1] != input_ids.shape[:1]:
            return False
        return name in PER_ROW or (name in PER_TOKEN and value.shape == input_ids.shape)

    return all(is_per_row(name, value) for name, value in inputs.items())
