"""Rows of a tokenised dataset to one mixed-task batch.

In:   features with `input_ids`, `labels` and `task` (a name or an id), of different lengths.
Out:  padded tensors and `task_ids`; `logits_to_keep` says which last positions hold answers.
Who:  `ALoRATrainer` and every evaluation; usable with any `DataLoader`.

Rows are padded on the left, so all answers end in the last columns and a language model has to compute its
vocabulary-sized logits there only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..modules.tasks import task_id

IGNORED = -100


class TaskCollator:
    """Pad on the left and turn task names into ids.

    Args:
        pad_token_id: fills `input_ids`.
        tasks: names, in the order of the model's ids.
        pad_to_multiple_of: round the length up, for fewer shapes under `torch.compile`.

    Returns (of a call):
        `input_ids`, `attention_mask`, `position_ids`, `labels` `[B, T]`, `task_ids` `[B]`, `logits_to_keep`.

    Raises:
        KeyError: a feature without `input_ids` or `task`.
        ValueError: an unknown task; the valid ones are listed.
    """

    def __init__(self, pad_token_id: int, tasks: Sequence[str], *, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.tasks, self.pad_to_multiple_of = pad_token_id, tuple(tasks), pad_to_multiple_of

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch."""
        for key in ("input_ids", "task"):
            if key not in features[0]:
                raise KeyError(f"a feature has no {key!r}, only {', '.join(features[0])}")
        longest = max(len(f["input_ids"]) for f in features)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = self._pad([f["input_ids"] for f in features], length, self.pad_token_id)
        ones = [f.get("attention_mask", [1] * len(f["input_ids"])) for f in features]
        attention_mask = self._pad(ones, length, 0)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": (attention_mask.cumsum(1) - 1).clamp_min(0),
            "task_ids": torch.tensor([task_id(f["task"], self.tasks) for f in features]),
        }
        if "labels" in features[0]:
            labels = self._labels(features, length)
            batch["labels"] = labels
            if labels.dim() == 2:
                answered = (labels != IGNORED).any(0).nonzero()
                first = int(answered[0]) if answered.numel() else length - 1
                # positions, not their number: a slice of the hidden states would send the output layer down a path
                # that copies its weight for every row (13 % of a training step of SmolLM2 on a CPU)
                batch["logits_to_keep"] = torch.arange(max(first, 1) - 1, length)
        return batch

    def _labels(self, features: Sequence[Mapping[str, Any]], length: int) -> Tensor:
        """Labels per token, padded with -100; or one class per row, for classifiers."""
        if isinstance(features[0]["labels"], int):
            return torch.tensor([f["labels"] for f in features])
        return self._pad([f["labels"] for f in features], length, IGNORED)

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
        out = torch.full((len(rows), length), value, dtype=torch.long)
        for target, row in zip(out, rows, strict=True):
            if len(row):
                target[length - len(row) :] = torch.as_tensor(row)
        return out
