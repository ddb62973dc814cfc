"""Tasks as a model has them and as a dataset names them: the table of names, the routing of a batch, the order of rows.

The numbers in a batch count the names of one table, the collator's. Which adapter is active, and in which order it has
its tasks, may change afterwards, so each batch is routed by the names. No rows are read that are costly to make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, IterableDataset, Sampler, Subset

from ..modules.adapter import BASE, AdaptedLinear, plain_task, task_id
from ..routing import Routing
from ..tuner.layer import ALoRALayer
from ..tuner.router import TableRouting

Tables = dict[str, tuple[str, ...]]
DROP_IN = ""  # drop-in layers have one table and no adapter's name
KINDS = (ALoRALayer, AdaptedLinear)
NOT_KNOWN = -2
BALANCED = ("random", "group_by_length")  # values of train_sampling_strategy that mix tasks
MEGABATCH = 50  # batches that rows of similar length are looked for in, as transformers does
PER_ROW = ("input_ids", "labels", "task_ids", "decoder_input_ids", "decoder_attention_mask")
PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids")  # one entry per row in the shape of input_ids


def task_layers(model: nn.Module) -> list[Any]:
    """The layers that may be routed by ids."""
    return [module for module in model.modules() if isinstance(module, KINDS)]


def active_tables(layers: Iterable[Any]) -> Tables:
    """Adapter -> its task names, for each adapter that is active now and picks by ids; `DROP_IN` for drop-in layers."""
    tables: Tables = {}
    for module in layers:
        if isinstance(module, ALoRALayer):
            specs = module.asymlora_spec
            tables.update({n: specs[n].tasks for n in module.active_adapters if n in specs and specs[n].tasks})
        elif module.tasks and tables.setdefault(DROP_IN, module.tasks) != module.tasks:
            raise ValueError(
                f"some layers have the tasks {', '.join(tables[DROP_IN])}, others {', '.join(module.tasks)}: a batch"
                " has one id per row, so give all layers the same tasks in the same order"
            )
    return tables


def names_of(tables: Tables) -> tuple[str, ...]:
    """All names, those of the first adapter first."""
    return tuple(dict.fromkeys(name for table in tables.values() for name in table))


def check_adapted(model: nn.Module) -> None:
    """Raise ValueError unless the model has something to train for tasks: ALoRA layers, or any PEFT adapter."""
    kinds = (*KINDS, BaseTunerLayer)
    if not getattr(model, "peft_config", None) and not any(isinstance(module, kinds) for module in model.modules()):
        raise ValueError(
            "the model has no ALoRA layer: wrap it with get_peft_model(model, ALoRAConfig(...)), add an adapter with"
            " model.add_adapter(ALoRAConfig(...)), or put FusedALoRALinear.from_linear(layer, r, tasks=[...]) in the"
            " place of its linear layers"
        )


def stacked_a(model: nn.Module) -> Iterator[nn.Parameter]:
    """What each task has for itself in a routed model: the stacked A `[E, R, K]`, and B where they are stacked too."""
    for module in task_layers(model):
        specs = module.asymlora_spec if isinstance(module, ALoRALayer) else {}
        routed = {name for name, spec in specs.items() if spec.tasks}
        for name, p in module.named_parameters():
            if isinstance(module, ALoRALayer):  # its B is that of all tasks, also where experts have one each
                stacked = "asymlora_A" in name and bool(routed & set(name.split(".")))
            else:
                stacked = bool(module.tasks) and ("lora_A" in name or "lora_B" in name) and p.dim() == 3
            if stacked:
                yield p


def batch_routing(task_ids: Tensor, names: Sequence[str], tables: Tables) -> Routing:
    """The routing of a batch whose ids, per row or per token, count `names`; -1 is the base alone.

    `tables` are those of `active_tables`, at least one. ValueError if no active adapter knows a row's task.
    """
    if all(table[: len(names)] == tuple(names) for table in tables.values()):
        return Routing(task_ids)
    by_table: dict[tuple[str, ...], Tensor] = {}
    for table in tables.values():
        places = [table.index(name) if name in table else NOT_KNOWN for name in names]
        by_table[table] = torch.tensor([*places, -1], device=task_ids.device)[task_ids]  # id -1 is the last
    unknown = torch.stack([ids == NOT_KNOWN for ids in by_table.values()]).all(0)
    if unknown.any():
        strangers = sorted({names[i] for i in task_ids[unknown].tolist()})
        known = "; ".join(f"{name or 'the layers'}: {', '.join(table)}" for name, table in tables.items())
        raise ValueError(f"no active adapter has the task {', '.join(strangers)}. Active are {known}")
    by_table = {table: ids.clamp_min(-1) for table, ids in by_table.items()}
    return TableRouting(by_table[tables.get(DROP_IN, next(iter(tables.values())))], by_table)


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
    shape = getattr(inputs.get("input_ids"), "shape", None)
    return shape is not None and all(
        isinstance(value, Tensor)
        and value.shape[:1] == shape[:1]
        and (name in PER_ROW or (name in PER_TOKEN and value.shape == shape))
        for name, value in inputs.items()
    )


def task_column(name: str, dataset: Any, *, read_rows: bool = False) -> list[Any] | None:
    """The task of every row, as Python values; None where that takes reading all rows or cannot be known.

    The dataset is anything a DataLoader takes: datasets.Dataset, lists of mappings, torch datasets, streams. With
    `read_rows` rows are read nevertheless where there is random access. `name` is the argument's, for errors.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [task_column(name, part, read_rows=read_rows) for part in dataset.datasets]
        return None if any(part is None for part in parts) else [task for part in parts for task in part or ()]
    if isinstance(dataset, Subset):
        whole = task_column(name, dataset.dataset, read_rows=read_rows)
        return None if whole is None else [whole[i] for i in dataset.indices]
    columns = getattr(dataset, "column_names", None)
    if columns is not None and getattr(dataset, "format", {}).get("type") == "custom":
        columns = None  # a transform may make others
    if columns is not None:
        _check_has_task(name, columns)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    if columns is not None:
        return [plain_task(task) for task in dataset.with_format(None)["task"]]
    if len(dataset) == 0:
        return []
    if not isinstance(dataset, list | tuple) and not read_rows:
        _task_of(name, dataset[0])
        return None
    return [_task_of(name, dataset[i]) for i in range(len(dataset))]


def row_lengths(dataset: Any, column: str) -> list[int]:
    """Tokens of every row: what a column of the dataset says, or the number of its `input_ids`."""
    names = getattr(dataset, "column_names", None) or ()
    if column in names:
        return [int(length) for length in dataset.with_format(None)[column]]
    if "input_ids" in names:
        return [len(ids) for ids in dataset.with_format(None)["input_ids"]]
    return [len(dataset[i]["input_ids"]) for i in range(len(dataset))]


def _task_of(name: str, row: Any) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"a row of {name} is a {type(row).__name__}: give mappings with `input_ids`, `labels`, `task`")
    _check_has_task(name, row)
    return plain_task(row["task"])


def _check_has_task(name: str, columns: Iterable[str]) -> None:
    if "task" not in columns:
        raise ValueError(f"{name} has no `task` column (a name or id per row), only {', '.join(columns)}")


def _parts(datasets: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every dataset with the name of its argument, which may hold several by name, or be None."""
    for name, dataset in datasets.items():
        if dataset is not None:
            yield from ((name, part) for part in (dataset.values() if isinstance(dataset, Mapping) else [dataset]))


def check_datasets(datasets: Mapping[str, Any], names: Sequence[str], tables: Tables) -> None:
    """Raise ValueError unless an active adapter knows the tasks of the data, as far as can be told before training."""
    for name, part in _parts(datasets):
        check_class_label(name, part, names)
        for task in dict.fromkeys(task_column(name, part) or ()):
            index = task_id(task, names)
            if index >= 0 and not any(names[index] in table for table in tables.values()):
                batch_routing(torch.tensor([index]), names, tables)  # says so


def names_in(datasets: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Task names from the data, for the logs of a model that takes no ids; None where a dataset does not tell."""
    found: set[str] = set()
    for name, part in _parts(datasets):
        column = task_column(name, part)
        if column is None:
            return None
        numbers = [task for task in column if isinstance(task, int)]
        found.update(str(i) for i in range(max(numbers, default=-1) + 1))
        found.update(task for task in column if isinstance(task, str) and task != BASE)
    return tuple(sorted(found, key=lambda task: (not task.isdigit(), int(task) if task.isdigit() else 0, task)))


def check_class_label(name: str, dataset: Any, names: Sequence[str]) -> None:
    """Raise ValueError, with both lists, unless a column of class numbers, which has names, counts as the model."""
    inside = dataset.datasets if isinstance(dataset, ConcatDataset) else []
    for part in [dataset.dataset] if isinstance(dataset, Subset) else inside:
        check_class_label(name, part, names)
    meant = getattr((getattr(dataset, "features", None) or {}).get("task"), "names", None)
    if meant is not None and tuple(meant) != tuple(names)[: len(meant)]:
        raise ValueError(
            f"the numbers in the `task` column of {name} mean {', '.join(meant)}, but the model's tasks are"
            f" {', '.join(names)}: turn them into names (dataset.features['task'].int2str)"
        )


def check_order(dataset: Any, strategy: str, temperature: float, weights: Mapping[Any, float] | None = None) -> None:
    """Raise ValueError unless the training set can be read in the order that is asked for."""
    if isinstance(dataset, Mapping):
        raise ValueError(f"train_dataset holds {', '.join(map(str, dataset))}: pass one of them, or join them")
    stream = isinstance(dataset, IterableDataset)
    if (temperature != 1.0 or weights) and (stream or strategy not in BALANCED):
        reason = "a stream has its own order" if stream else f"train_sampling_strategy is {strategy!r}"
        asked, remedy = (f"task_weights={weights}", "out") if weights else (f"task_temperature={temperature}", "at 1")
        raise ValueError(
            f"{asked} draws rows task by task, but {reason}: leave it {remedy}"
            + ("; datasets.interleave_datasets(probabilities=...) mixes streams" if stream else "")
        )
    if stream and strategy not in ("random", "sequential"):
        raise ValueError(
            f"train_sampling_strategy={strategy!r} needs a dataset with random access, and train_dataset is a stream:"
            " leave the argument out, or sort before streaming"
        )


class TaskBalancedSampler(Sampler[int]):
    """Examples in an order that mixes tasks, small tasks repeated or large ones thinned by temperature.

    Formula: task t gets a share of the epoch proportional to `n_t ** (1 / temperature)`. At 1 every example is drawn
    once; towards infinity all tasks come equally often. With weights it is then drawn `w_t` times as often, which makes
    the epoch longer or shorter.

    With lengths, rows of similar length come together without changing what an epoch draws: within some batches' rows
    each task's shortest go to one batch, its longest to another, so that every batch keeps its mix of tasks.

    Args:
        tasks: the task of each example, a name or an id; a tensor or an array of ids is grouped by value.
        temperature: T >= 1.
        weights: w > 0 of some of the tasks; that of the others is 1.
        seed: with the epoch it determines the order.
        lengths: tokens of each example; None: batches mix lengths.
        batch_size: rows of a batch, where lengths are given.

    Source: temperature-scaled mixing, Raffel et al. 2020 (T5), section 3.5.2.
    """

    def __init__(
        self,
        tasks: Sequence[str | int],
        *,
        temperature: float = 1.0,
        weights: Mapping[Any, float] | None = None,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
    ) -> None:
        if len(tasks) == 0:
            raise ValueError("the training set is empty")
        if temperature < 1.0:
            raise ValueError(f"temperature must be at least 1 (1 keeps the sizes), got {temperature}")
        if lengths is not None and len(lengths) != len(tasks):
            raise ValueError(f"{len(tasks)} examples need as many lengths, got {len(lengths)}")
        self.seed, self.epoch, self._lengths, self._batch_size = seed, 0, lengths, batch_size
        self._task_of = [plain_task(task) for task in tasks] if lengths is not None else []
        self._members: dict[str | int, list[int]] = {}
        for index, task in enumerate(tasks):
            self._members.setdefault(plain_task(task), []).append(index)
        times = dict(weights or {})
        if strange := [task for task, w in times.items() if task not in self._members or not 0 < w < float("inf")]:
            raise ValueError(
                f"weights are numbers above 0 of tasks that have examples, got {times}: see {strange[0]!r}"
            )
        shares = {task: len(members) ** (1.0 / temperature) for task, members in self._members.items()}
        scale = len(tasks) / sum(shares.values())
        self.counts = {task: max(1, round(share * scale * times.get(task, 1))) for task, share in shares.items()}

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch; called by the trainer, also when it resumes."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        placed: list[tuple[float, int]] = []
        for task, members in self._members.items():
            count = self.counts[task]
            # each pass over a task is its own shuffle, so an example repeats only after all others came
            passes = [torch.randperm(len(members), generator=generator) for _ in range(-(-count // len(members)))]
            order = torch.cat(passes)[:count].tolist()
            # the j-th draw of a task lands in the j-th of count equal slices of the epoch
            places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
            placed += zip(places.tolist(), (members[i] for i in order), strict=True)
        drawn = [index for _, index in sorted(placed)]
        return iter(drawn if self._lengths is None else self._by_length(drawn, self._lengths, generator))

    def _by_length(self, drawn: list[int], lengths: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        """The same rows; place by place in its task's order of lengths, a batch holds what is equally far along."""
        size, many = self._batch_size, max(1, min(len(drawn) // (4 * self._batch_size), MEGABATCH)) * self._batch_size
        for start in range(0, len(drawn), many):
            rows = drawn[start : start + many]
            by_task: dict[Any, list[int]] = {}
            for row in sorted(rows, key=lambda row: lengths[row]):
                by_task.setdefault(self._task_of[row], []).append(row)
            along = [((i + 0.5) / len(of), row) for of in by_task.values() for i, row in enumerate(of)]
            ordered = [row for _, row in sorted(along, key=lambda pair: pair[0])]
            whole = len(ordered) // size
            for batch in [*torch.randperm(whole, generator=generator).tolist(), whole]:  # the last may be short
                yield from ordered[batch * size : (batch + 1) * size]
