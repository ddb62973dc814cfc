"""One model's mixed batch beside its rows alone: outputs, loss and gradients.

In:   a case of the table.
Out:  the largest differences found, relative to the largest entry of what is right; the caller asserts.
Who:  `checks`, which adds what else users do with a model.

"Alone" is the same row as a batch of one, unpadded, with its task, through the model's own forward and loss. The mixed
batch goes the way of `ALoRATrainer`: its data loader, its collator, its `compute_loss`.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainingArguments

from alora_kernels import ALoRAConfig, ALoRATrainer

from .case import Case
from .rows import alone, make_rows, padded

TASKS = ["red", "green", "blue"]
MIXED = ["green", "red", "__base__", "blue"]
LENGTHS = [7, 3, 9, 5]
SQUARE = [4, 2, 3, 4]  # as many tokens as rows: the layout cannot be told from the shape
EVEN = [4, 4, 4, 4]


def targets_of(case: Case) -> Any:
    """`target_modules` as a user writes it."""
    return list(case.targets) if isinstance(case.targets, tuple) else case.targets


def config(case: Case, **more: Any) -> ALoRAConfig:
    """Three tasks, B not zero."""
    return ALoRAConfig(
        r=4,
        lora_alpha=8,
        tasks=TASKS,
        target_modules=targets_of(case),
        exclude_modules=list(case.exclude_modules) or None,
        task_type=case.task_type,
        init_weights=False,
        **more,
    )


@cache
def adapted(case: Case) -> tuple[PeftModel, tuple[str, ...]]:
    """The model with its adapter, and the warnings it gave."""
    base = case.build()
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(base, config(case))
    return model.train(), tuple(str(w.message) for w in caught)


def difference(found: Tensor, right: Tensor) -> float:
    """Largest error relative to the largest entry of what is right."""
    assert found.shape == right.shape, f"{tuple(found.shape)} instead of {tuple(right.shape)}"
    error = (found - right).abs().max() / right.abs().max().clamp_min(1e-12)
    return float(error) if torch.isfinite(error) else float("inf")


class Padding:
    """What of a tokenizer the trainer asks for."""

    def __init__(self, pad_token_id: int, padding_side: str) -> None:
        self.pad_token_id, self.padding_side = pad_token_id, padding_side


@cache
def trainer_of(case: Case) -> ALoRATrainer:
    """The trainer whose data loader and loss the mixed batches go through."""
    rows = make_rows(case, [3, 3], TASKS[:2])

    def users_collator(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """For rows that are not text alone: padded as ever, with one id per row."""
        ids = [-1 if feature["task"] == "__base__" else TASKS.index(feature["task"]) for feature in features]
        return padded(case, features) | {"task_ids": torch.tensor(ids)}

    collator = {} if "input_ids" in rows[0] and case.rows != "patches and text" else {"data_collator": users_collator}
    dataset = Dataset.from_list(rows)
    arguments = TrainingArguments(tempfile.mkdtemp(), report_to=[], use_cpu=True)
    padding = Padding(case.pad, "left" if case.pads_left else "right")
    return ALoRATrainer(
        model=adapted(case)[0], args=arguments, train_dataset=dataset, processing_class=padding, **collator
    )


def batch_of(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The mixed batch that the trainer makes of these rows."""
    trainer = trainer_of(case)
    trainer.args.per_device_eval_batch_size = len(rows)
    (batch,) = trainer.get_eval_dataloader(Dataset.from_list(list(rows)))
    floating = {k: v.to(case.dtype) for k, v in batch.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {**batch, **floating}


def call(model: Any, batch: dict[str, Any], names: Any = None, **more: Any) -> Any:
    """The model's own forward on a batch, logits for all positions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    known = inspect.signature(base.forward).parameters
    inputs = {k: v for k, v in batch.items() if k in known and k not in ("task_ids", "logits_to_keep")}
    routed = {} if names is None else {"adapter_names": names}
    return model(**inputs, **routed, **more)


def row_outputs(outputs: Any, batch: dict[str, Any]) -> list[Tensor]:
    """What the model says of each row, at its real positions."""
    if "start_logits" in outputs:
        pairs = torch.stack([outputs.start_logits, outputs.end_logits], -1)
        return [row[real.bool()] for row, real in zip(pairs, batch["attention_mask"], strict=True)]
    if "logits_per_image" in outputs:
        return list(torch.cat([outputs.text_embeds, outputs.image_embeds], 1))
    logits = outputs.logits
    if logits.dim() == 2:
        return list(logits)
    labels, mask = batch.get("labels"), batch.get("attention_mask")
    if mask is None or mask.shape[1] != logits.shape[1] or "decoder_hidden_states" in outputs.__dataclass_fields__:
        mask = labels != -100  # of a decoder
    return [row[real.bool()] for row, real in zip(logits, mask, strict=True)]


def values(case: Case, lengths: Sequence[int], names: Sequence[str] = MIXED, seed: int = 0) -> float:
    """Mixed batch and rows alone: largest difference of what the model says."""
    model, rows = adapted(case)[0], make_rows(case, lengths, names, seed)
    batch = batch_of(case, rows)
    with torch.no_grad():
        mixed = row_outputs(call(model, batch, batch["task_ids"]), batch)
        right = [
            row_outputs(call(model, alone(row, case.dtype), [row["task"]]), alone(row, case.dtype))[0] for row in rows
        ]
    return max(difference(found, wanted) for found, wanted in zip(mixed, right, strict=True))


def base_values(case: Case, lengths: Sequence[int] = LENGTHS) -> float:
    """The same for the model without any adapter: what is its own doing."""
    model, rows = case.build(), make_rows(case, lengths, MIXED)
    batch = padded(case, rows)
    with torch.no_grad():
        mixed = row_outputs(call(model, batch), batch)
        right = [row_outputs(call(model, alone(row, case.dtype)), alone(row, case.dtype))[0] for row in rows]
    return max(difference(found, wanted) for found, wanted in zip(mixed, right, strict=True))


def label_count(case: Case, row: dict[str, Any]) -> int:
    """How many labels the model's own mean is taken over."""
    labels = row.get("labels")
    if not isinstance(labels, list) or isinstance(labels[0], float):
        return 1
    return sum(label != -100 for label in (labels[1:] if case.task_type == "CAUSAL_LM" else labels))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of everything that trains, by name."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), grads, strict=True)}


def gradient_difference(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of two sets of gradients; entries count relative to their tensor, or to a tiny gradient."""
    tiny = 1e-3 * max(float(t.abs().max()) for t in right.values())
    assert tiny > 0
    return max(float((found[n] - t).abs().max()) / max(float(t.abs().max()), tiny) for n, t in right.items())


@contextlib.contextmanager
def with_aux(case: Case) -> Iterator[None]:
    """The model adds its losses over the whole batch (load balancing of experts), which do not add up from rows."""
    config = adapted(case)[0].get_base_model().config
    if case.aux:
        assert config.output_router_logits is False
        config.output_router_logits = True
    try:
        yield
    finally:
        if case.aux:
            config.output_router_logits = False


def training(case: Case, lengths: Sequence[int] = LENGTHS, names: Sequence[str] = MIXED) -> float:
    """The trainer's loss and gradients on the mixed batch, and those of the rows alone, weighed by their labels."""
    model, rows, trainer = adapted(case)[0], make_rows(case, lengths, names), trainer_of(case)
    mixed = trainer.compute_loss(model, batch_of(case, rows))
    counts = torch.tensor([label_count(case, row) for row in rows])
    losses = torch.stack([call(model, alone(row, case.dtype), [row["task"]]).loss for row in rows])
    return _compared(model, mixed, (losses * counts).sum() / counts.sum())


def own_loss(case: Case, lengths: Sequence[int] = LENGTHS) -> float:
    """The trainer's loss on a batch and the model's own on the same batch, losses over the whole batch included."""
    model, batch = adapted(case)[0], batch_of(case, make_rows(case, lengths, MIXED))
    with with_aux(case):
        trainer = trainer_of.__wrapped__(case)  # a new one: it may have learned how the loss was without
        own = call(model, batch, batch["task_ids"]).loss
        return _compared(model, trainer.compute_loss(model, dict(batch)), own)


def _compared(model: Any, loss: Tensor, right: Tensor) -> float:
    """Largest difference of two losses and of their gradients."""
    gradient = gradient_difference(gradients(model, loss), gradients(model, right))
    return max(difference(loss.detach(), right.detach()), gradient)
