"""`ALoRATrainer`: transformers' Trainer for batches that mix tasks.

What is added is small: the collator turns names into ids, `compute_loss` sets the routing context around the model
call, and the model's own loss is taken by rows, where it can be, so that each task's share can be logged. Everything
else, resume included, is Trainer's own.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.constants import FSDP_MODEL_NAME
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..routing import current_routing, route
from ..tensor_file import verify
from ..tuner import CheckpointGuard
from ..tuner.register import Source, reading
from . import tasks
from .absent import KeepingTrainer
from .checkpoints import WholeCheckpoints, check_best
from .collator import TaskCollator, WithTasks, positions
from .loss import ModelLoss, Scored, TaskSums
from .packing import Packing
from .processes import Dealt, agree_on_batches, batch_means, check_alike, check_launch, check_whole, own_rows
from .rules import BatchRules, base_model, text_config

# transformers 5.17, say, divides by the number of batches of a step whatever a model without loss kwargs gives
DIVIDES_AGAIN = not hasattr(Trainer, "loss_is_scaled_for_ga")
SAME_WHEN_SHARDED = (
    "peft_type", "tasks", "routing", "num_experts", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
)  # fmt: skip


class ALoRATrainer(KeepingTrainer, WholeCheckpoints, Trainer):
    """Train several tasks at once on one frozen model.

    Args:
        *args: as `transformers.Trainer`.
        task_temperature: 1 draws every example once; larger values let small tasks come more often, see
            `TaskBalancedSampler`.
        task_weights: how many times as often the rows of a task are drawn.
        keep_absent_tasks: A of a task that a step's batch does not hold is left as it is, moments included.
        padding_free: train on the tokens of a batch side by side, without padding; None: on CPUs. Only where the first
            batch proves that losses and gradients stay the same; `packing.padded_because` says why it does not.
        **kwargs: as `transformers.Trainer`. Rows need `input_ids`, `labels` and `task`, or it is a ValueError, as is a
            task that no active adapter has. With the training argument `train_sampling_strategy="group_by_length"` a
            batch holds rows of similar length, tasks mixed as ever.
    """

    model: Any
    data_collator: Any

    def __init__(
        self,
        *args: Any,
        task_temperature: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
        keep_absent_tasks: bool = True,
        padding_free: bool | None = None,
        **kwargs: Any,
    ) -> None:
        own_collator = (args[2] if len(args) > 2 else kwargs.get("data_collator")) is None
        self.task_temperature, self.keep_absent_tasks = task_temperature, keep_absent_tasks
        self.task_weights = dict(task_weights or {})
        self.packing = Packing(padding_free)
        super().__init__(*args, **kwargs)
        tasks.check_adapted(self.model)
        check_best(self.args)
        self._rules = BatchRules.of(self.model)
        self._layers = tasks.task_layers(self.model)
        tables = tasks.active_tables(self._layers)
        datasets = {"train_dataset": self.train_dataset, "eval_dataset": self.eval_dataset}
        given = () if own_collator else tuple(getattr(self.data_collator, "tasks", ()))
        self.tasks: tuple[str, ...] = given or tasks.names_of(tables) or (not tables and tasks.names_in(datasets)) or ()
        self._counts_ours = not given  # what the ids of a batch count is our table, which may grow
        if own_collator:
            self.data_collator = TaskCollator(self._pad_token_id(), self.tasks, model=self._rules)
        elif not isinstance(self.data_collator, TaskCollator | WithTasks):
            self.data_collator = WithTasks(self.data_collator, self.tasks, self._rules)
        tasks.check_order(self.train_dataset, self.args.train_sampling_strategy, task_temperature, task_weights)
        if tables:
            tasks.check_datasets(datasets, self.tasks, tables)
        CheckpointGuard.install(base_model(self.model))
        self._optimized: set[int] | None = None
        self._trained = TaskSums(self.tasks)  # since the last log
        self._evaluated = TaskSums(self.tasks)  # in the last evaluation
        self._told: set[str] = set()
        self._all_logits = True
        self._drawn = 0  # rows of an epoch; 0 of a stream
        self._means: list[tuple[float, int]] = []  # of the batches of the last evaluation, with their rows
        self._predicted: Tensor | None = None  # ids of the batch of a prediction step
        self._losses = {mode: ModelLoss(self._rules) for mode in (True, False)}  # in training, in evaluation

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; on CPUs accelerate leaves a wish for FSDP out without a word."""
        plugin = self.args.fsdp_plugin_args
        wished = plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if wished and int((plugin or os.environ).get("fsdp_version" if plugin else "FSDP_VERSION", 1)) != 2:
            raise ValueError("FSDP 1 is not supported: set fsdp_version to 2")
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if wished and state.distributed_type == DistributedType.MULTI_CPU:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**(plugin or {}))
            PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled = True

    def _pad_token_id(self) -> int | None:
        """The tokenizer's padding, of which the model's config is told as `train` would, for heads that look for it."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        pad, config = getattr(tokenizer, "pad_token_id", None), getattr(base_model(self.model), "config", None)
        if pad is not None and config is not None:
            text_config(config).pad_token_id = pad
        return pad

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns or []
        self._signature_columns: Any = [*columns, *({"task", "labels", "input_ids", "attention_mask"} - set(columns))]

    @property
    def routed(self) -> bool:
        """Whether an active adapter picks its matrices by the ids of the batch."""
        return bool(tasks.active_tables(self._layers))

    def call_model_init(self, trial: Any = None) -> Any:
        """As Trainer's, with the routing kept by checkpointing."""
        model: Any = super().call_model_init(trial)
        CheckpointGuard.install(base_model(model))
        return model

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; names of adapters that became active are added to the end of the table first."""
        check_launch(self.args, self.accelerator.num_processes)
        self._layers = tasks.task_layers(self.model)
        tables = tasks.active_tables(self._layers)
        names = tuple(dict.fromkeys([*self.tasks, *tasks.names_of(tables)]))
        if self._counts_ours and names != self.tasks:
            self.tasks = self.data_collator.tasks = names
            self._trained = TaskSums(names)
        tasks.check_class_label(f"the {description.lower()} dataset", dataset, self.tasks)
        if self.accelerator.num_processes > 1:
            check_alike({"the batches": self.tasks, **{f"adapter {name!r}": table for name, table in tables.items()}})
            if isinstance(dataset, IterableDataset):
                dataset = self._dealt(dataset, description, training=kwargs.get("is_training", False))
        return super()._get_dataloader(dataset, description, *args, **kwargs)

    def _dealt(self, stream: Any, description: str, *, training: bool) -> Any:
        """A stream that every process reads for its rows of each step; accelerate wants rows of one length."""
        check_whole(stream, description)
        if not training:
            raise ValueError(
                f"{description.lower()} of a stream over several processes counts its last rows twice: give a dataset"
                " with random access, such as Dataset.from_list(list(stream))"
            )
        config, rows = self.accelerator.dataloader_config, self.args.train_batch_size * self.accelerator.num_processes
        config.dispatch_batches = bool(config.dispatch_batches)
        return Dealt(stream, rows, self.args.seed)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Tasks spread evenly where they are known, also where rows are grouped by length; else as Trainer has it."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        column, strategy = None, self.args.train_sampling_strategy
        if strategy in tasks.BALANCED:
            read = self.task_temperature != 1.0 or bool(self.task_weights)
            column = tasks.task_column("train_dataset", dataset, read_rows=read)
        if column is None:
            theirs: Any = super()._get_train_sampler(dataset)
            self._drawn = len(theirs) if theirs is not None else 0
            return theirs
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        lengths = tasks.row_lengths(dataset, self.args.length_column_name) if strategy != "random" else None
        order: dict[str, Any] = {"lengths": lengths, "batch_size": self.args.train_batch_size}
        order |= {"temperature": self.task_temperature, "weights": self.task_weights, "seed": seed}
        sampler = tasks.TaskBalancedSampler(column, **order)
        self._drawn = len(sampler)
        return sampler

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """As Trainer's; what one of several processes cannot use all refuse, so that none waits for it."""
        if self.accelerator.num_processes == 1:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches: list[Any] = []
        error: Exception | None = None
        try:
            batches.extend(islice(epoch_iterator, num_batches))
            for batch in batches:
                self._routing(batch.get("task_ids"))
        except Exception as raised:
            error = raised
        agree_on_batches(self.accelerator, ["task_ids" in batch for batch in batches], error)
        state, config = self.accelerator.gradient_state, self.accelerator.dataloader_config
        filled = config.even_batches and not config.split_batches and not self.args.dataloader_drop_last
        masked = self.compute_loss_func is None  # an own loss does what it likes with labels that count for nothing
        if state.end_of_dataloader and filled and self._drawn and masked and self.get_tp_size() == 1:
            batches[-1] = own_rows(self.accelerator, batches[-1], self._drawn, self.args.train_batch_size)
        return batches, self._get_num_items_in_batch(batches, device)

    def _routing(self, task_ids: Tensor | None) -> contextlib.AbstractContextManager[Any]:
        """Routing by the names that the ids stand for: which adapters are active may have changed."""
        tables = tasks.active_tables(self._layers) if task_ids is not None else {}
        if task_ids is None or not tables:
            return contextlib.nullcontext()
        return route(tasks.batch_routing(task_ids, self.tasks, tables))

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch as this model's forward takes it, with positions where padding on the left moves them."""
        known = {k: v for k, v in inputs.items() if k != "task_ids"}
        mask = known.get("attention_mask")
        if self._rules.positions and isinstance(mask, Tensor) and mask.dim() == 2:
            known.setdefault("position_ids", positions(mask))
        if not self._rules.takes("position_ids"):
            known.pop("position_ids", None)
        return known

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's mean loss per label, of all labels of the step where Trainer counts them; tasks are logged."""
        if self._predicted is not None:
            inputs = {**inputs, "task_ids": self._predicted}
        by_rows, training = self._has_token_loss(inputs, model), model.training
        smoothed = self.label_smoother is not None and training and not by_rows
        if self.compute_loss_func is not None or smoothed or not isinstance(inputs.get("labels"), Tensor):
            # Trainer's own smoother divides by the labels of the step; everything else here it scales as it knows to
            self.loss_is_scaled_for_ga = True if smoothed and num_items_in_batch is not None else None
            with self._routing(inputs.get("task_ids")):
                given: Any = super().compute_loss(model, self._model_inputs(inputs), return_outputs, num_items_in_batch)
            return (self._undivided(given[0]), given[1]) if return_outputs else self._undivided(given)
        if training and self.routed and not return_outputs:
            inputs = tasks.side_by_side(inputs)
        task_ids, smoothing = inputs.get("task_ids"), self.args.label_smoothing_factor if training else 0.0
        all_logits = return_outputs and self._all_logits

        def run(given: dict[str, Any], counts: Tensor | None = None) -> Scored:
            known = self._model_inputs(given)
            with self._routing(given.get("task_ids")):
                return self._losses[training](model, known, smoothing, all_logits=all_logits, counts=counts)

        packs = training and not return_outputs
        scored = self.packing(run, inputs, model, self._losses[training]) if packs else run(inputs)
        if task_ids is not None:
            rows = task_ids, scored.counts, scored.losses, scored.right
            alone = self.get_tp_size() > 1  # every process has all rows
            if not training and scored.losses is not None and task_ids.dim() == 1 and not alone:  # each row once
                rows = self.accelerator.gather_for_metrics(rows)
                self._means += batch_means(rows[1], rows[2], len(task_ids))
            (self._trained if training else self._evaluated).add(*rows)
        loss = scored.mean
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is not None:  # the share of this batch in the labels of the step
            if training:  # a step without a label moves nothing; an evaluation leaves such a batch out
                num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp_min(1)
            loss = loss * (scored.counts.sum() / num_items_in_batch)
            if self.args.average_tokens_across_devices:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        loss = self._undivided(loss)
        return (loss, scored.outputs) if return_outputs else loss

    def _has_token_loss(self, inputs: dict[str, Any], model: nn.Module) -> bool:
        """Whether the loss is a cross entropy that can be split by row; the first batch with labels is tried."""
        labels = inputs.get("labels")
        if self.compute_loss_func is not None or not isinstance(labels, Tensor) or labels.is_floating_point():
            return False

        def call(few: dict[str, Any]) -> Any:
            with self.compute_loss_context_manager(), self._routing(few.get("task_ids")):
                return model(**self._model_inputs(few))

        loss = self._losses[model.training]
        if "task_ids" in inputs or current_routing() is None:  # ids set by a caller are those of all rows
            loss.learn(call, inputs, self._agreed, model)
        return bool(loss.by_rows)

    def _agreed(self, verdict: int) -> int:
        """The largest of all processes: they must run the model and gather its scores equally often."""
        return int(self.accelerator.gather(torch.tensor([verdict], device=self.accelerator.device)).max())

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As Trainer's, for every model, and of the labels that its loss counts."""
        if not batch_samples or not isinstance(batch_samples[0].get("labels"), Tensor):
            return super()._get_num_items_in_batch(batch_samples, device)
        counted = []
        for batch in map(self._prepare_inputs, batch_samples):
            self._has_token_loss(batch, self.model_wrapped)
            labels = self._losses[self.model_wrapped.training].counted(batch)
            labels = torch.zeros_like(labels) if labels.is_floating_point() else labels
            counted.append({"labels": labels, "shift_labels": labels})
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True
        try:
            return super()._get_num_items_in_batch(counted, device)
        finally:
            self.model_accepts_loss_kwargs = accepts

    def _undivided(self, loss: Tensor) -> Tensor:
        """The loss, so that it is right after a division that this version of transformers makes once too often."""
        divided = not self.model_accepts_loss_kwargs and self.compute_loss_func is None and self.model.training
        if DIVIDES_AGAIN and divided and self.loss_is_scaled_for_ga:
            return loss * self.current_gradient_accumulation_steps
        return loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's; made anew when other parameters train than before."""
        trained = {id(p) for p in self.model.parameters() if p.requires_grad}
        if self._optimized not in (None, trained):  # by an optimiser that was made here, for another adapter
            self.optimizer = None
        if self.optimizer is None:
            self._optimized = trained
        return super().create_optimizer(*args, **kwargs)

    @property
    def _keeps(self) -> bool:  # type: ignore[override]
        """Whether rows of absent tasks are left as they are."""
        return self.keep_absent_tasks and self.routed

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's makes one more step of a finished run that is resumed inside an epoch."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As Trainer's, every adapter under its own name."""
        sharded = any(Path(resume_from_checkpoint).glob(f"{FSDP_MODEL_NAME}*"))
        if sharded != self.is_fsdp_enabled:
            raise ValueError(
                f"{resume_from_checkpoint} was written {'under' if sharded else 'without'} FSDP, whose optimiser state"
                " has another form: resume as it was begun, under FSDP with any number of processes, one too (torchrun)"
            )
        if sharded:
            self._check_sharded(Path(resume_from_checkpoint))
        if sharded or not load_adapters(self.model if model is None else model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As Trainer's; beside a sharded model lies what its matrices mean."""
        super()._save_optimizer_and_scheduler(output_dir)
        sharded = self.is_fsdp_enabled and isinstance(self.model, PeftModel) and self.is_world_process_zero()
        if sharded and not Path(output_dir, CONFIG_NAME).exists():
            self.model.peft_config[self.model.active_adapter].save_pretrained(output_dir)

    def _check_sharded(self, checkpoint: Path) -> None:
        """Raise a ValueError unless its adapter has this one's tasks and scaling: FSDP goes by places alone."""
        if not isinstance(self.model, PeftModel) or not (checkpoint / CONFIG_NAME).exists():
            return
        there, here = PeftConfig.from_pretrained(str(checkpoint)), self.model.peft_config[self.model.active_adapter]
        for name in SAME_WHEN_SHARDED:
            was, is_now = getattr(there, name, None), getattr(here, name, None)
            if was != is_now:
                raise ValueError(f"{checkpoint} was written with {name}={was!r}, here it is {is_now!r}: resume as then")

    def _load_best_model(self) -> None:
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if sharded or not load_adapters(self.model, str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _tell_unlabelled(self, sums: TaskSums, where: str) -> None:
        if sums.unlabelled and where not in self._told and self.is_world_process_zero():
            self._told.add(where)
            warnings.warn(
                f"{sums.unlabelled} of {sums.rows} rows {where} have no label that counts (all are -100, or the first"
                " token alone is labelled): they are left out of loss and accuracy",
                stacklevel=3,
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._trained.sum_over(self.accelerator)  # every process logs the tasks of all
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with `loss_<task>` beside `loss`."""
        if "loss" in logs:
            logs.update(self._trained.logs())
            self._tell_unlabelled(self._trained, "in the first steps of training")
            self._trained = TaskSums(self.tasks)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's, with loss and exact-match accuracy of each task, and the mean accuracy over tasks."""
        self._evaluated, self._means = TaskSums(self.tasks), []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        ours = {f"{metric_key_prefix}_{key}": value for key, value in self._evaluated.metrics().items()}
        metrics = {**ours, **(output.metrics or {})}  # a caller's own metrics come first
        if self.accelerator.num_processes > 1 and self._means and not self._rules.balancing:
            total = sum(mean * rows for mean, rows in self._means)  # Trainer's has rows that are there twice
            metrics[f"{metric_key_prefix}_loss"] = total / sum(rows for _, rows in self._means)
        output = output._replace(metrics=metrics)
        self._tell_unlabelled(self._evaluated, f"of the {description.lower()}")
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """As Trainer's, routed; logits that nobody asks for are not computed."""
        inputs = self._prepare_inputs(inputs)
        self._all_logits, self._predicted = not prediction_loss_only, inputs.get("task_ids")
        try:
            with self._routing(self._predicted):  # a Seq2SeqTrainer beside us gives all it gets to `generate`
                return super().prediction_step(model, self._model_inputs(inputs), prediction_loss_only, ignore_keys)
        finally:
            self._all_logits, self._predicted = True, None


def load_adapters(model: Any, folder: str) -> bool:
    """Read every adapter of the model that a checkpoint of Trainer's holds, each under its own name.

    transformers looks for the best model in the folder itself only, reads it into the first active adapter whatever
    that is called, leaves one adapter active, and cannot read an adapter that `model.add_adapter` made. Which adapters
    are active and which are trained stays as it was.

    False for a model without adapters and for a checkpoint that is not one of adapters: those are Trainer's. ValueError
    if an active adapter is not in the checkpoint, or what is there does not fit it.
    """
    names, whole = list(getattr(model, "peft_config", None) or ()), Path(folder)
    if not names or not whole.is_dir():
        return False
    active = active_adapters(model)
    # the folder itself holds "default"; transformers saves its one active adapter there, whatever it is called
    root = "default" if "default" in names and isinstance(model, PeftModel) else active[0] if len(active) == 1 else ""
    places = {name: whole / name if _holds(whole / name) or name != root else whole for name in names}
    found = {name: place for name, place in places.items() if _holds(place)}
    if not found and not any(_holds(place) for place in (whole, *whole.iterdir())):
        return False
    missing = [name for name in active if name not in found]
    if missing:
        raise ValueError(
            f"{folder} has no weights of the active adapter {', '.join(missing)}: make the adapter under the name that"
            " it was saved with, or another one active"
        )
    for name, place in found.items():
        if (weights := place / SAFETENSORS_WEIGHTS_NAME).is_file():
            verify(weights)
        with reading(Source(str(place), name, {}, new=False)):
            tensors = load_peft_weights(str(place), device="cpu")
            result: Any = set_peft_model_state_dict(model, tensors, adapter_name=name)
        if strange := result.unexpected_keys:
            raise ValueError(f"{place} has weights that adapter {name!r} does not: {', '.join(strange[:5])}")
    return True


def active_adapters(model: Any) -> list[str]:
    """Names of the active adapters; an attribute in PEFT, a method in transformers."""
    active = getattr(model, "active_adapters", [])
    return list(active() if callable(active) else active)


def _holds(folder: Path) -> bool:
    return any((folder / file).is_file() for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
