"""Labels of a batch: one per row, several per row, one per token, or a sequence of their own.

In:   the labels of each row, the rows' lengths and what the model is.
Out:  one tensor in the form the model's own loss takes.
Who:  `TaskCollator`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .padding import as_tensors, pad, per_token, round_up, stack
from .rules import IGNORED, BatchRules

NAMES = ("labels", "label", "label_ids")  # as transformers' own collators read them


def label_column(features: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any]] | None:
    """The name and the values of the labels, None for rows without."""
    name = next((name for name in NAMES if features[0].get(name) is not None), None)
    return None if name is None else (name, [feature.get(name) for feature in features])


def batch_labels(
    name: str, values: Sequence[Any], lengths: Sequence[int], length: int, rules: BatchRules, multiple: int
) -> Tensor:
    """Labels as one tensor.

    Args:
        name: of the column, for messages.
        values: of each row.
        lengths: tokens of each row.
        length: of the padded rows.
        rules: of the model.
        multiple: the length of labels that are a sequence of their own is rounded up to it.

    Returns:
        `[B]` classes or values, `[B, C]` for several per row, `[B, T]` with -100 where nothing is asked.

    Raises:
        ValueError: labels that are no numbers, or of another length than their rows.
    """
    tensors = as_tensors(name, values)
    if len({t.dim() for t in tensors}) > 1:
        raise ValueError(f"column {name!r} mixes single labels and lists of labels")
    if tensors[0].dim() == 0 or rules.labels is not None:
        return _of_rows(stack(name, tensors), rules)
    tensors = [t.long() if t.dtype == torch.bool else t for t in tensors]
    if rules.encoder_decoder:
        longest = round_up(max(t.shape[0] for t in tensors), multiple)
        return pad(name, tensors, longest, IGNORED, left=False)
    if per_token(tensors, lengths):
        if tensors[0].is_floating_point() and any(n != length for n in lengths):
            raise ValueError(
                f"column {name!r} holds floats per token, for which there is no value that a loss ignores: use batches"
                " of rows of one length"
            )
        return _predictable(pad(name, tensors, length, IGNORED, rules.pad_left), lengths, rules)
    if tensors[0].is_floating_point():
        return stack(name, tensors)
    row = next(i for i, t in enumerate(tensors) if t.shape[0] != lengths[i])
    raise ValueError(
        f"column {name!r} of row {row} of the batch has {tensors[row].shape[0]} labels for {lengths[row]} tokens of"
        " input_ids: give one per token with -100 where nothing is asked, or one per row; several per row"
        " (a classifier's) and a sequence of their own (an encoder-decoder's) need TaskCollator(..., model=model)"
    )


def _of_rows(labels: Tensor, rules: BatchRules) -> Tensor:
    """Labels of a classifier of rows in the dtype its loss takes: classes are integers, all others floats."""
    if labels.dim() == 2 and labels.shape[1] == 1 and (rules.labels or 1) > 1:
        labels = labels.squeeze(1)  # a class in a list of its own
    several = labels.dim() == 2 or rules.problem in ("regression", "multi_label_classification")
    if rules.labels is not None and several:
        if labels.dim() == 2 and labels.shape[1] != rules.labels:
            raise ValueError(f"labels have {labels.shape[1]} entries per row, the model has num_labels={rules.labels}")
        return labels.to(torch.get_default_dtype())
    if rules.labels is not None and labels.is_floating_point():
        raise ValueError(
            f"labels are floats, but the model chooses one of num_labels={rules.labels} classes: give integers, or set"
            " config.problem_type to 'regression' or 'multi_label_classification'"
        )
    return labels.long() if labels.dtype == torch.bool else labels


def _predictable(labels: Tensor, lengths: Sequence[int], rules: BatchRules) -> Tensor:
    """Without the labels of first tokens where the loss shifts: nothing comes before them but padding."""
    if rules.shifts:
        starts = torch.tensor([labels.shape[1] - n if rules.pad_left else 0 for n in lengths])
        labels[torch.arange(len(lengths)), starts] = IGNORED
    return labels
