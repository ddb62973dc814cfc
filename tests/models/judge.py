"""One model's mixed batch beside its rows alone, rows as a user's data set has them: outputs, loss and gradients.

Differences are the largest found, relative to the largest entry of what is right; the caller asserts. "Alone" is the
same row as a batch of one, unpadded, with its task, through the model's own forward and loss. The mixed batch goes the
way of `ALoRATrainer`: its data loader, its collator, its `compute_loss`.
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

from .cases import EOS, LABELS, VOCAB, Case

TASKS = ["red", "green", "blue"]
MIXED = ["green", "red", "__base__", "blue"]
LENGTHS = [7, 3, 9, 5]
SQUARE = [4, 2, 3, 4]  # as many tokens as rows: the layout cannot be told from the shape
EVEN = [4, 4, 4, 4]
IMAGE = VOCAB - 1  # the token that stands for a patch of an image
PATCHES = 4  # of an image of 8 x 8 pixels
FIRST = 4  # ids below are special


def make_rows(case: Case, lengths: Sequence[int], tasks: Sequence[str] = MIXED) -> list[dict[str, Any]]:
    """Rows of these lengths, one task each."""
    generator = torch.Generator().manual_seed(0)
    return [
        _row(case.rows, length, number, generator) | {"task": task}
        for number, (length, task) in enumerate(zip(lengths, tasks, strict=False))
    ]


def _tokens(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST, IMAGE, (length,), generator=generator).tolist()


def _row(kind: str, length: int, number: int, generator: torch.Generator) -> dict[str, Any]:
    ids = _tokens(length, generator)
    text: dict[str, Any] = {"input_ids": ids}
    if kind == "causal":  # the first row asks for every token, the others for an answer of two
        masked = 0 if number == 0 else max(length - 2, 0)
        return text | {"labels": [-100] * masked + ids[masked:]}
    if kind == "sequence":
        return text | {"labels": number % LABELS}
    if kind == "pairs":
        return text | {"labels": number % LABELS, "token_type_ids": [0] * (length // 2) + [1] * (length - length // 2)}
    if kind == "multi-label":
        return text | {"labels": [float((number + i) % 2) for i in range(LABELS)]}
    if kind == "token":
        return text | {"labels": [-100, *((number + i) % LABELS for i in range(length - 1))]}
    if kind.startswith("seq2seq"):  # targets shorter and longer than their source
        if kind != "seq2seq":  # without it LED's own gradients are nan where a window holds nothing but padding
            text["global_attention_mask"] = [1] + [0] * (length - 1)
        return text | {"labels": _tokens((3, 6, 2, 4)[number % 4], generator)}
    if kind == "question":
        return text | {"start_positions": number % length, "end_positions": length - 1}
    if kind == "regression":
        return text | {"labels": number / 2 - 1.0}
    if kind == "boxes":
        boxes = torch.randint(0, 30, (length, 2), generator=generator)
        labels = [-100, *((number + i) % LABELS for i in range(length - 1))]
        return text | {"bbox": torch.cat([boxes, boxes + 5], 1).tolist(), "labels": labels}
    if kind == "patches and text":  # images of 4 and of 6 patches
        grid = [1, 2, 2 + number % 2]
        ids = [VOCAB - 2] + [IMAGE] * (grid[1] * grid[2]) + [VOCAB - 3] + [i % 50 + FIRST for i in ids]
        pixels = torch.randn(grid[1] * grid[2], 3 * 2 * 2, generator=generator)
        labels, kinds = [-100] * (len(ids) - 2) + ids[-2:], [int(i == IMAGE) for i in ids]
        images = {"pixel_values": pixels, "image_grid_thw": [grid], "mm_token_type_ids": kinds}
        return {"input_ids": ids, "labels": labels} | images
    image = torch.randn(3, 8, 8, generator=generator)
    if kind == "speech":
        sound = torch.randn(8, 32, generator=generator)
        return {"input_features": sound, "labels": ids}
    if kind == "images and text":
        ids = [IMAGE] * PATCHES + ids
        return {"input_ids": ids, "pixel_values": image, "labels": [-100] * (len(ids) - 2) + ids[-2:]}
    if kind == "image-text pairs":
        return {"input_ids": [*ids[:-1], EOS], "pixel_values": image}
    assert kind == "images", kind
    return {"pixel_values": image, "labels": number % LABELS}


def padded(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The batch as a tokenizer and a stock collator make it, without tasks: what a model itself does with padding."""
    singles = [alone(row, case.dtype) for row in rows]
    side = "left" if case.pads_left else "right"
    batch: dict[str, torch.Tensor] = {}
    text = singles[0]["input_ids"].shape[1:] if "input_ids" in singles[0] else None
    for name, first in singles[0].items():
        values = [single[name] for single in singles]
        per_token = (name == "labels" and first.dim() == 2) or first.shape[1:2] == text
        if _flat(name, first) or first.is_floating_point() or not per_token:
            batch[name] = torch.cat(values)
            continue
        fill = {"input_ids": case.pad, "labels": -100}.get(name, 0)
        texts = [value[0] for value in values]
        batch[name] = torch.nn.utils.rnn.pad_sequence(texts, True, fill, "right" if name == "labels" else side)
    return batch


def alone(row: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The row as a batch of one, unpadded, without its task."""
    tensors = {name: torch.as_tensor(value) for name, value in row.items() if name != "task"}
    batch = {name: value if _flat(name, value) else value[None] for name, value in tensors.items()}
    if "input_ids" in batch:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def _flat(name: str, value: torch.Tensor) -> bool:
    """Whether a batch holds this after that of the row before, not beside it: patches and sizes of images."""
    return name == "image_grid_thw" or (name == "pixel_values" and value.dim() == 2)


def targets_of(case: Case) -> Any:
    """`target_modules` as a user writes it."""
    return list(case.targets) if isinstance(case.targets, tuple) else case.targets


@cache
def adapted(case: Case) -> tuple[PeftModel, tuple[str, ...]]:
    """The model with its adapter, and the warnings it gave."""
    base = case.build()
    torch.manual_seed(5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = ALoRAConfig(  # B is not zero
            r=4, lora_alpha=8, tasks=TASKS, target_modules=targets_of(case), init_weights=False,
            exclude_modules=list(case.exclude_modules) or None, task_type=case.task_type,
            target_parameters=case.parameters, experts_A=case.sharing[0], experts_B=case.sharing[1],
        )  # fmt: skip
        model = get_peft_model(base, settings)
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


def call(model: Any, batch: dict[str, Any], names: Any = None) -> Any:
    """The model's own forward on a batch, logits for all positions."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    known = inspect.signature(base.forward).parameters
    inputs = {k: v for k, v in batch.items() if k in known and k not in ("task_ids", "logits_to_keep")}
    routed = {} if names is None else {"adapter_names": names}
    return model(**inputs, **routed)


@torch.no_grad()
def said(model: Any, batch: dict[str, Any], names: Any = None) -> list[Tensor]:
    """What the model says of each row, at its real positions."""
    outputs = call(model, batch, names)
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


def values(case: Case, lengths: Sequence[int]) -> float:
    """Mixed batch and rows alone: largest difference of what the model says."""
    model, rows = adapted(case)[0], make_rows(case, lengths)
    batch = batch_of(case, rows)
    right = [said(model, alone(row, case.dtype), [row["task"]])[0] for row in rows]
    return max(difference(*pair) for pair in zip(said(model, batch, batch["task_ids"]), right, strict=True))


def base_values(case: Case) -> float:
    """The same for the model without any adapter: what is its own doing."""
    model, rows = case.build(), make_rows(case, LENGTHS)
    right = [said(model, alone(row, case.dtype))[0] for row in rows]
    return max(difference(*pair) for pair in zip(said(model, padded(case, rows)), right, strict=True))


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


def training(case: Case, lengths: Sequence[int]) -> float:
    """The trainer's loss and gradients on the mixed batch, and those of the rows alone, weighed by their labels."""
    model, rows, trainer = adapted(case)[0], make_rows(case, lengths), trainer_of(case)
    mixed = trainer.compute_loss(model, batch_of(case, rows))
    counts = torch.tensor([label_count(case, row) for row in rows])
    losses = torch.stack([call(model, alone(row, case.dtype), [row["task"]]).loss for row in rows])
    return _compared(model, mixed, (losses * counts).sum() / counts.sum())


def own_loss(case: Case) -> float:
    """The trainer's loss on a batch and the model's own on the same batch, losses over the whole batch included."""
    model, batch = adapted(case)[0], batch_of(case, make_rows(case, LENGTHS))
    with with_aux(case):
        trainer = trainer_of.__wrapped__(case)  # a new one: it may have learned how the loss was without
        own = call(model, batch, batch["task_ids"]).loss
        return _compared(model, trainer.compute_loss(model, dict(batch)), own)


def _compared(model: Any, loss: Tensor, right: Tensor) -> float:
    """Largest difference of two losses and of their gradients."""
    gradient = gradient_difference(gradients(model, loss), gradients(model, right))
    return max(difference(loss.detach(), right.detach()), gradient)
