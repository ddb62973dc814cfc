"""Rows of a tokenised dataset to one mixed-task batch.

In:   features with `input_ids`, `task` (a name or an id) and whatever else the model takes, of different lengths.
Out:  padded tensors with one entry per row, and the ids of the tasks.
Who:  `ALoRATrainer` and every evaluation; usable with any `DataLoader` and with transformers' own Trainer.

A row's logits must not depend on its neighbours. Encoders read their first position, so they are padded on the right;
language models that can be told positions are padded on the left, so that answers end in the last columns and the
vocabulary-sized logits are computed there only. `BatchRules` says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules.tasks import task_ids_from_names
from .labels import NAMES, batch_labels, label_column
from .padding import as_tensors, pad, per_token, round_up, stack
from .rules import BatchRules, base_model

FILL = {"special_tokens_mask": 1}  # what is no token counts as special; every other column is filled with 0


class TaskCollator:
    """Pad rows as the model needs it and turn task names into ids.

    Args:
        pad_token_id: fills `input_ids`; None takes the model's own, or 0: padding is masked.
        tasks: names, in the order of the model's ids; none for a model that takes no ids.
        model: says on which side to pad, whether to send positions, which columns to keep and what labels mean. Without
            it rows are padded on the left, as for a causal language model, and every column of numbers is kept.
        pad_to_multiple_of: round the length up, for fewer shapes under `torch.compile`.
        ids_name: the ids' name in the batch. The default is for `ALoRATrainer` and for loops that call
            `alora_kernels.route(batch.pop("task_ids"))`. transformers' own Trainer hands every entry to the model,
            where a PEFT model reads "adapter_names"; it needs `remove_unused_columns=False` to keep the column `task`.

    Returns (of a call):
        `input_ids`, `attention_mask` and other columns per token `[B, T, ...]`, columns per row `[B, ...]`, `labels`,
        `position_ids` `[B, T]` where padding is on the left and the model takes them, `task_ids` `[B]`.

    Raises:
        KeyError: a feature without `input_ids` or `task`.
        ValueError: an unknown task (the valid ones are listed), a column or labels that cannot be batched.
    """

    def __init__(
        self,
        pad_token_id: int | None,
        tasks: Sequence[str],
        *,
        model: Any = None,
        pad_to_multiple_of: int = 1,
        ids_name: str = "task_ids",
    ) -> None:
        self.tasks, self.pad_to_multiple_of, self.ids_name = tuple(tasks), pad_to_multiple_of, ids_name
        self.rules = BatchRules() if model is None else BatchRules.of(model)
        self.pad_token_id = pad_token_id if pad_token_id is not None else self.rules.pad_token_id or 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch."""
        for feature in features:
            for key in ("input_ids", "task") if self.tasks else ("input_ids",):
                if key not in feature:
                    raise KeyError(f"a feature has no {key!r}, only {', '.join(feature)}")
        rows = as_tensors("input_ids", [f["input_ids"] for f in features])
        for row, ids in enumerate(rows):
            if ids.dim() != 1 or not len(ids):
                raise ValueError(
                    f"input_ids of row {row} of the batch have shape {tuple(ids.shape)}, not one token or more"
                )
        lengths = [len(ids) for ids in rows]
        length = round_up(max(lengths), self.pad_to_multiple_of)
        if self.rules.leaks and min(lengths) < length:
            warnings.warn(
                f"layers of {self.rules.leaks} let padding change the tokens beside it: rows are not scored as they are"
                " alone, unless all rows of a batch have one length",
                stacklevel=2,
            )
        batch = {"input_ids": pad("input_ids", rows, length, self.pad_token_id, self.rules.pad_left)}
        batch |= self._mask(features, lengths, length)
        for name in dict.fromkeys(name for feature in features for name in feature):
            if name not in ("input_ids", "attention_mask", "task", *NAMES):
                column = self._column(name, [f.get(name) for f in features], lengths, length)
                batch |= {} if column is None else {name: column}
        labels = label_column(features)
        if labels is not None:
            batch["labels"] = batch_labels(*labels, lengths, length, self.rules, self.pad_to_multiple_of)
        if self.tasks:
            batch[self.ids_name] = task_ids_from_names([f["task"] for f in features], self.tasks)
        return batch

    def _knows(self, name: str) -> bool:
        return self.rules.columns is None or name in self.rules.columns

    def _mask(self, features: Sequence[Mapping[str, Any]], lengths: Sequence[int], length: int) -> dict[str, Tensor]:
        """`attention_mask`, and the positions that follow from it where padding is on the left."""
        if not self._knows("attention_mask"):
            if not self.rules.causal and any(n != length for n in lengths):
                raise ValueError(
                    f"the model takes no attention_mask, so padding would change a row of {min(lengths)} tokens beside"
                    f" {length}: use batches of rows of one length"
                )
            return {}
        ones = [f.get("attention_mask") for f in features]
        masks = as_tensors(
            "attention_mask", [[1] * n if mask is None else mask for n, mask in zip(lengths, ones, strict=True)]
        )
        if any(m.dim() != 1 for m in masks) or not per_token(masks, lengths):
            raise ValueError("attention_mask must have one entry per token of input_ids in every row")
        mask = pad("attention_mask", [m.long() for m in masks], length, 0, self.rules.pad_left)
        if self.rules.pad_left and self.rules.positions and "position_ids" not in features[0]:
            return {"attention_mask": mask, "position_ids": positions(mask)}
        return {"attention_mask": mask}

    def _column(self, name: str, values: list[Any], lengths: Sequence[int], length: int) -> Tensor | None:
        """One of the other columns as a tensor, None where the model has no use for it."""
        said = next((value for value in values if value is not None), None)
        if not self._knows(name) or said is None or (self.rules.columns is None and isinstance(said, str)):
            return None
        tensors = as_tensors(name, values)
        if name.startswith("decoder_") and all(t.dim() for t in tensors):  # a sequence of its own
            longest = round_up(max(len(t) for t in tensors), self.pad_to_multiple_of)
            fill = self.pad_token_id if name == "decoder_input_ids" else 0
            return pad(name, tensors, longest, fill, left=False)
        if per_token(tensors, lengths):
            return pad(name, tensors, length, FILL.get(name, 0), self.rules.pad_left)
        return stack(name, tensors)


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token among those of its row that are no padding, `[B, T]`."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0)


class WithTasks:
    """A collator that knows nothing of tasks, beside a column `task`.

    Args:
        collator: e.g. one of transformers'; it gets the rows without `task`, unless it asks for it.
        tasks: names, in the order of the model's ids.
        model: a tokenizer that pads where this model cannot bear it is warned of.

    Returns (of a call):
        The collator's batch and `task_ids`: `[B]`, or `[1, T]` with an id per token where it put all rows in one.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], tasks: Sequence[str], *, model: Any = None) -> None:
        self.collator, self.tasks = collator, tuple(tasks)
        self.tokenizer = getattr(collator, "tokenizer", None)  # which Trainer saves with the model
        rules = BatchRules() if model is None else BatchRules.of(model)
        if getattr(self.tokenizer, "padding_side", None) == "left" and not (rules.pad_left or rules.positions):
            warnings.warn(
                f"the data_collator pads on the left, but {type(base_model(model)).__name__} cannot be told positions:"
                " short rows may be read from their padding; set tokenizer.padding_side = 'right'",
                stacklevel=3,
            )

    def __call__(self, features: Sequence[Any]) -> Any:
        """One batch."""
        if not any(isinstance(f, Mapping) and "task" in f for f in features):
            return self.collator(list(features))  # it must know the tasks by other means
        try:
            batch = self.collator([{k: v for k, v in f.items() if k != "task"} for f in features])
        except KeyError as error:
            if error.args != ("task",):
                raise
            return self.collator(list(features))  # made for mixed batches: it reads the tasks itself
        if "task_ids" in batch:
            return self.collator(list(features))
        if not self.tasks:  # of a model that takes no ids
            return batch
        ids = task_ids_from_names([f["task"] for f in features], self.tasks)
        batch["task_ids"] = self._spread(ids, features, batch)
        return batch

    @staticmethod
    def _spread(ids: Tensor, features: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
        """An id per row of the batch, or per token where rows were joined.

        Raises:
            ValueError: the batch has neither a row per feature nor their tokens one after another.
        """
        inputs = next((v for k, v in batch.items() if k == "input_ids" or isinstance(v, Tensor)), None)
        shape = tuple(getattr(inputs, "shape", ()))
        if not shape or shape[0] == len(features):
            return ids
        tokens = torch.tensor([len(f.get("input_ids", ())) for f in features])
        if shape == (1, int(tokens.sum())):
            return ids.repeat_interleave(tokens)[None]
        raise ValueError(
            f"the data_collator made a batch of shape {shape} from {len(features)} rows: which task each part belongs"
            " to is not known; let it return `task_ids`, one per row or per token"
        )
