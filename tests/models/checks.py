"""What users do with a model besides a mixed batch: stock LoRA, saving, merging, generating; and the list of checks."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

import alora_kernels
from alora_kernels.tuner import ALoRALayer
from alora_kernels.tuner.experts import StackedWeight

from .cases import Case
from .judge import (
    EVEN,
    LENGTHS,
    SQUARE,
    TASKS,
    adapted,
    batch_of,
    difference,
    make_rows,
    own_loss,
    said,
    targets_of,
    training,
    values,
)


def lora_config(case: Case) -> LoraConfig:
    """Stock LoRA on the same targets."""
    excluded = list(case.exclude_modules) or None
    stacks = adapted(case)[0].peft_config["default"].target_parameters if case.parameters else None
    return LoraConfig(
        r=4, lora_alpha=8, target_modules=targets_of(case), exclude_modules=excluded, task_type=case.task_type,
        target_parameters=stacks,
    )  # fmt: skip


def stock_lora(case: Case, task: int) -> PeftModel:
    """PEFT's own LoRA with one task's A and the shared B, on a fresh base."""
    model, settings = adapted(case)[0], lora_config(case)
    # what we leave out would do nothing, and fails where a router returns several tensors
    settings.exclude_modules = model.peft_config["default"].exclude_modules
    lora = get_peft_model(case.build(), settings)
    theirs, ours = dict(lora.named_modules()), dict(model.named_parameters())
    # around a module with two parameters PEFT nests its wrappers
    wrapped = {f"{name.replace('.base_layer', '')}.{m.parameter_name}": m for name, m in theirs.items()
               if isinstance(m, ParamWrapper)}  # fmt: skip
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, StackedWeight) and layer.asymlora_spec:
                a, b = layer.factors("default", task)
                wrapped[name].lora_A["default"].weight.copy_(a.flatten(0, 1))
                wrapped[name].lora_B["default"].weight.copy_(b.permute(1, 2, 0).flatten(1))
            elif isinstance(layer, ALoRALayer) and layer.asymlora_spec:
                a, b = layer.asymlora_A["default"].weight[task], layer.asymlora_B["default"].weight
                if name.removeprefix("base_model.model.") in lora.targeted_module_names:
                    theirs[name].lora_A["default"].weight.copy_(a)
                    theirs[name].lora_B["default"].weight.copy_(b)
                else:  # beside fused experts PEFT leaves out linear layers of their names
                    theirs[name].weight += 2 * b @ a
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name:
                parameter.copy_(ours[name])
    return lora


def stock(case: Case) -> float:
    """One task for all rows: the same batch through stock PEFT LoRA with that task's A and the shared B."""
    model, lora = adapted(case)[0], stock_lora(case, TASKS.index("green"))
    batch = batch_of(case, make_rows(case, LENGTHS, ["green"] * 4))
    return difference(torch.cat(said(model, batch, batch["task_ids"])), torch.cat(said(lora, batch)))


def reloaded(case: Case) -> PeftModel:
    """The adapter saved and loaded onto a fresh base."""
    with tempfile.TemporaryDirectory() as folder:
        adapted(case)[0].save_pretrained(folder)
        return PeftModel.from_pretrained(case.build(), folder)


def saving(case: Case) -> float:
    """Every trained parameter comes back, and the outputs with them."""
    model, again = adapted(case)[0], reloaded(case)
    loaded = dict(again.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(loaded[name], parameter), name
    batch = batch_of(case, make_rows(case, LENGTHS))
    return difference(
        torch.cat(said(again, batch, batch["task_ids"])), torch.cat(said(model, batch, batch["task_ids"]))
    )


def merging(case: Case) -> float:
    """One task merged into the base; the same as unmerged. ValueError if the merge is refused."""
    model, again = adapted(case)[0], reloaded(case)
    batch = batch_of(case, make_rows(case, LENGTHS, ["green"] * 4))
    alora_kernels.set_task(again, "green")
    merged = again.merge_and_unload()
    return difference(torch.cat(said(merged, batch)), torch.cat(said(model, batch, batch["task_ids"])))


GENERATE: tuple[dict[str, int], ...] = ({}, {"num_beams": 2}, {"num_beams": 2, "num_return_sequences": 2})
NEW = 4  # tokens per text


def generating(case: Case) -> float:
    """Texts of a mixed batch and of its rows alone: greedy, with beams, and several texts per row."""
    model = adapted(case)[0].eval()
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in make_rows(case, SQUARE)]
    try:
        for options in GENERATE:
            texts = _generate(case, model, rows, options)
            alone = torch.cat([_generate(case, model, [row], options) for row in rows])
            assert torch.equal(texts, alone), f"{options}: {texts.tolist()} instead of {alone.tolist()}"
    finally:
        model.train()
    return 0.0


def _generate(case: Case, model: Any, rows: Sequence[dict[str, Any]], options: dict[str, int]) -> Tensor:
    """The new tokens of every text."""
    names, length = [row["task"] for row in rows], {"max_new_tokens": NEW, "min_new_tokens": NEW}
    with torch.no_grad():
        out = model.generate(**_prompts(case, rows), adapter_names=names, **length, pad_token_id=case.pad, **options)
    return out[:, -NEW:]


def _prompts(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Prompts padded as generation wants them: on the left for decoders, on the right for encoders."""
    batch: dict[str, Tensor] = {}
    for name in ("pixel_values", "input_features"):
        if name in rows[0]:
            batch[name] = torch.stack([torch.as_tensor(row[name]) for row in rows]).to(case.dtype)
    if "input_ids" in rows[0]:
        side = "right" if case.task_type == "SEQ_2_SEQ_LM" else "left"
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        batch["input_ids"] = pad(ids, True, case.pad, side)
        batch["attention_mask"] = pad([torch.ones_like(row) for row in ids], True, 0, side)
    if "global_attention_mask" in rows[0]:
        masks = [torch.tensor(row["global_attention_mask"]) for row in rows]
        batch["global_attention_mask"] = torch.nn.utils.rnn.pad_sequence(masks, True)
    return batch


def targets(model: Any) -> set[str]:
    """What an adapter sits on, layers counted as one."""
    names = [*model.targeted_module_names, *getattr(model, "targeted_parameter_names", [])]
    return {re.sub(r"(?<=[._])\d+(?=\.)", "*", name) for name in names}


@cache
def excluded(case: Case) -> tuple[str, ...]:
    """What stock LoRA adapts under the same targets and we leave out."""
    return tuple(sorted(targets(get_peft_model(case.build(), lora_config(case))) - targets(adapted(case)[0])))


def _values(case: Case) -> float:
    return max(values(case, lengths) for lengths in (LENGTHS, SQUARE, EVEN, [2, 2], [1, 4]))


def _training(case: Case) -> float:
    return max(training(case, lengths) for lengths in (LENGTHS, SQUARE, EVEN))


CHECKS: dict[str, Callable[[Case], float]] = {  # name -> the largest relative error of a case, 0 where all is right
    "mixed batch": _values,
    "training": _training,
    "the model's own loss": own_loss,
    "stock LoRA": stock,
    "save and load": saving,
    "merge": merging,
    "generate": generating,
}


def checks_of(case: Case) -> list[str]:
    """The checks that make sense for a model."""
    if case.refused:
        return []
    without = set() if case.generates else {"generate"}
    if case.merge_refused:
        without.add("merge")
    if case.rows == "question":  # its own softmax runs over padding too
        without.add("training")
    if case.rows == "image-text pairs":  # its own loss compares the rows of a batch with each other
        without |= {"training", "the model's own loss"}
    return [name for name in CHECKS if name not in without]


@cache
def measured(case: Case, check: str) -> float:
    """The error that a check finds, measured once."""
    return CHECKS[check](case)
