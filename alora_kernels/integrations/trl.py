"""TRL's trainers for batches that mix tasks: `with_tasks(SFTTrainer)(model, args=..., train_dataset=...)`.

TRL drops the column that says a row's task, and its batches are not its datasets' rows: pairs are all chosen before all
rejected, GRPO generates for many batches at once, shuffles them and scores them in parts, packed rows hold several
texts. Here the column stays, ids follow each of these steps, and every call of the model is routed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import warnings
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..modules.adapter import task_ids_from_names
from ..routing import route
from ..training import tasks
from ..training.absent import KeepingTrainer
from ..training.checkpoints import WholeCheckpoints
from ..training.collator import WithTasks
from ..training.output_head import without_dropout
from ..training.packing import SAME
from ..training.processes import check_launch

TOKENS = "input_ids", "labels"  # of a tokenised row
TESTED = "1.10", "1.16"  # releases of TRL, the first and the last


class TaskTrainer(KeepingTrainer, WholeCheckpoints, Trainer):
    """What every trainer needs; `with_tasks` puts it before one of TRL's.

    Args:
        *args: as the trainer's, as are all others. Rows of the datasets need a `task`, a name or an id.
        keep_absent_tasks: A of a task that a step's batch does not hold is left as it is, moments included.

    Raises:
        ValueError: no active adapter picks by task, a dataset has no column `task`, or one that no adapter knows.
    """

    model: Any
    data_collator: Any
    _running: Tensor | None = None  # ids of the batch that is computed
    _compares = False  # with a reference, which TRL makes of the adapter "default" where no ref_model is given

    def __init__(self, *args: Any, keep_absent_tasks: bool = True, **kwargs: Any) -> None:
        self._keeps = keep_absent_tasks
        super().__init__(*args, **kwargs)
        active = getattr(self.model, "active_adapters", [])
        if self._compares and "ref" in getattr(self.model, "peft_config", ()) and active != ["default"]:
            raise ValueError(
                f'TRL\'s reference "ref" is a copy of the adapter "default", but {active} trains: load what is to train'
                ' as "default"'
            )
        names, tables = self._tasks()
        if not tables:
            raise ValueError(
                "no active adapter picks by task: give peft_config=ALoRAConfig(tasks=[...]); soft routing and other"
                " adapters need no with_tasks"
            )
        for name in ("train_dataset", "eval_dataset"):
            given = getattr(self, name)
            for part in given.values() if isinstance(given, Mapping) else [given]:
                if "seq_lengths" not in _columns(part):
                    tasks.check_datasets({name: part}, names, tables)

    def _tasks(self) -> tuple[tuple[str, ...], tasks.Tables]:
        """Names that ids count, and the tables of the active adapters."""
        tables = tasks.active_tables(tasks.task_layers(self.model))
        return tasks.names_of(tables), tables

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns: Any = list(dict.fromkeys([*(self._signature_columns or []), "task"]))

    @contextlib.contextmanager
    def _collating(self) -> Iterator[None]:
        """Loaders that are made here give ids; TRL finds its own collator everywhere else."""
        plain = self.data_collator
        self.data_collator = WithTasks(plain, self._tasks()[0])
        try:
            yield
        finally:
            self.data_collator = plain

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        check_launch(self.args, self.accelerator.num_processes)
        with self._collating():
            return super()._get_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _routed(self, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The batch without its ids, which route every call of the model inside."""
        if inputs.get("task_ids") is None:
            raise ValueError(
                "the batch says no task of its rows: the dataset needs a column `task`, a name per row, and a"
                " data_collator of your own gives one entry per row"
            )
        before, self._running = self._running, inputs["task_ids"]
        try:
            with route(tasks.batch_routing(inputs["task_ids"], *self._tasks())):
                yield {name: value for name, value in inputs.items() if name != "task_ids"}
        finally:
            self._running = before

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, routed."""
        with self._routed(inputs) as known:
            return super().compute_loss(model, known, *args, **kwargs)


class _WithReference(TaskTrainer):
    """DPO, KTO: the reference is asked for a batch, or before training for all; it may be a copy of the adapter."""

    _compares = True

    def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        with self._collating():
            return parent._precompute_ref_logps(*args, **kwargs)

    def compute_ref_log_probs(self, *args: Any) -> Any:
        """As the trainer's, routed."""
        parent: Any = super()
        with self._routed(args[-1]) as known:
            return parent.compute_ref_log_probs(*args[:-1], known)


class _Packing(TaskTrainer):
    """SFT: texts that are packed keep their tasks, and the model is proven to keep them apart."""

    padding_free: bool
    _proven = False

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *others: Any) -> Any:
        columns = _columns(dataset)
        if "task" not in columns:
            raise ValueError(f"a dataset has no `task` column (a name per row), only {', '.join(columns)}")
        if "seq_lengths" in columns:
            return dataset  # was here before
        parent: Any = super()
        dataset = parent._prepare_dataset(dataset, processing_class, args, False, *others)
        if not packing:
            return dataset
        if args.packing_strategy != "bfd" or args.max_length is None:
            told = f"packing_strategy={args.packing_strategy!r} with max_length={args.max_length}"
            raise ValueError(f"{told}: texts of several tasks are packed whole, by 'bfd' up to a max_length")
        if not self.padding_free:
            raise ValueError("eval_packing=True needs packing=True: TRL lets texts of padded batches see each other")
        packed = pack_rows(dataset, args.max_length)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As the trainer's, routed; the first batch of several texts in a row is proven first."""
        if not self._proven and getattr(inputs.get("task_ids"), "ndim", 0) == 2:
            if "position_ids" not in inputs:
                raise ValueError("rows of several texts need padding_free=True: without it they would see each other")
            starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
            if len(starts) > 1:
                self._prove(model, inputs, starts[1], [*starts, inputs["input_ids"].shape[1]][2])
                self._proven = True
        return super().compute_loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _prove(self, model: nn.Module, inputs: dict[str, Any], start: int, end: int) -> None:
        """Raise a ValueError unless the model gives the second text of a row the logits that it has alone."""
        row, ids = inputs["input_ids"], inputs["task_ids"]

        def logits(given: dict[str, Any], first: int) -> Tensor:
            places = torch.arange(first, first + end - start, device=row.device)
            with self._routed(given) as known, self.compute_loss_context_manager():
                return model(**known, use_cache=False, logits_to_keep=places).logits[0].double()

        with without_dropout(model):
            alone = logits({"input_ids": row[:, start:end], "task_ids": ids[:, start:end]}, 0)
            together = logits({name: value for name, value in inputs.items() if name != "labels"}, start)
        dtype = torch.get_autocast_dtype(row.device.type) if self.args.bf16 or self.args.fp16 else self.model.dtype
        error = float((together - alone).norm() / alone.norm())
        if not error <= SAME.get(dtype, 4 * torch.finfo(dtype).eps):
            raise ValueError(
                f"with {self.model.config._attn_implementation!r} attention logits of a packed text are off by"
                f" {error:.2g}: the model does not keep texts apart, so set packing=False and padding_free=False"
            )


class _Generating(TaskTrainer):
    """GRPO, RLOO: a batch is rows of a dataset until completions were generated, then as those were shuffled."""

    _compares = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if any(getattr(given, "use_vllm", False) is True for given in (*args, *kwargs.values())):
            raise ValueError("use_vllm=True generates with weights that one task was merged into: leave it out")
        super().__init__(*args, **kwargs)

    @contextlib.contextmanager
    def _collating(self) -> Iterator[None]:
        yield  # its collator gives the rows as they are

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        parent: Any = super()
        told = all("task" in row for row in inputs)
        ids = task_ids_from_names([row["task"] for row in inputs], self._tasks()[0]) if told else None
        with self._routed({"task_ids": ids}):
            return parent._generate_and_score_completions(inputs) | {"task_ids": ids}

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, keep: int, batch_size: Any = None, **given: Any
    ) -> Any:
        """As the trainer's, which would call the model for some rows at a time: here each time with their ids."""
        parent: Any = super()
        cut = batch_size and not any(isinstance(value, Tensor | list) for value in given.values())  # images are not
        ids, size, parts = self._running, batch_size if cut else len(input_ids), []
        assert ids is not None
        for ids_of_part, *part in zip(*(t.split(size) for t in (ids, input_ids, attention_mask)), strict=True):
            with self._routed({"task_ids": ids_of_part}):
                parts.append(parent._get_per_token_logps_and_entropies(model, *part, keep, **given))
        return tuple(
            None if found[0] is None else torch.cat(found) if found[0].dim() else torch.stack(found).mean()
            for found in zip(*parts, strict=True)
        )


def _columns(dataset: Any) -> list[str]:
    """Names of the columns; none where they cannot be told."""
    names = getattr(dataset, "column_names", ())
    return list(next(iter(dataset)) if names is None else names)


def pack_rows(dataset: Any, max_length: int) -> Any:
    """Rows of several texts, as TRL packs them, of tokenised rows with `input_ids`, `labels`, `task`; streams too.

    Lists `task` and `seq_lengths` say whose each text is.
    """
    from trl.data_utils import pack_dataset

    name_of = getattr((dataset.features or {}).get("task"), "int2str", lambda task: task)

    def of_tokens(row: dict[str, Any]) -> dict[str, Any]:
        return {**{key: row[key] for key in TOKENS}, "tasks": [name_of(row["task"])] * len(row["input_ids"])}

    def of_texts(row: dict[str, Any]) -> dict[str, Any]:
        return {"task": [row["tasks"][end - 1] for end in accumulate(row["seq_lengths"])]}

    packed = pack_dataset(dataset.map(of_tokens, remove_columns=_columns(dataset)), max_length)
    return packed.map(of_texts, remove_columns=["tasks"])


KINDS: dict[str, type[TaskTrainer]] = {
    "SFTTrainer": _Packing, "DPOTrainer": _WithReference, "KTOTrainer": _WithReference, "RewardTrainer": TaskTrainer,
    "GRPOTrainer": _Generating, "RLOOTrainer": _Generating,
}  # fmt: skip


@functools.cache
def with_tasks(trainer: type) -> Any:
    """A subclass of one of TRL's trainers, see `TaskTrainer`, for datasets with a column `task`.

    Args:
        trainer: SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer, GRPOTrainer, RLOOTrainer, or a subclass.

    Raises:
        TypeError: another class, of which it is not known where its batches have a dataset's rows.
    """
    theirs = next((c for c in getattr(trainer, "__mro__", ()) if c.__module__.startswith("trl.")), object)
    kind = KINDS.get(theirs.__name__) if theirs.__module__.startswith("trl.trainer.") else None
    if kind is None:
        raise TypeError(f"with_tasks knows {', '.join(KINDS)} and their subclasses, got {trainer!r}")
    _check_version(importlib.metadata.version("trl"))
    return type(f"{trainer.__name__}WithTasks", (kind, trainer), {"__module__": __name__})


@functools.cache
def _check_version(version: str) -> None:
    first, this, last = ([int(part) for part in v.split(".")[:2]] for v in (TESTED[0], version, TESTED[1]))
    if not first <= this <= last:
        warnings.warn(f"TRL {version} was not tested with tasks, only {' to '.join(TESTED)} were", stacklevel=3)
