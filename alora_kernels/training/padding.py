"""Columns of a dataset to tensors with one entry per row.

In:   the values of one column, row by row: numbers, lists, NumPy or torch arrays.
Out:  one tensor `[B, ...]`: padded where a value has an entry per token, stacked where all shapes are equal.
Who:  `TaskCollator`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensors(name: str, values: Sequence[Any]) -> list[Tensor]:
    """Each row's value as a tensor: whole numbers int64, others in torch's default float, truth values as they are.

    Raises:
        ValueError: a value that is missing or not made of numbers, with the column and the row.
    """
    tensors: list[Tensor] = []
    for row, value in enumerate(values):
        if value is None:
            raise ValueError(f"column {name!r} has no value in row {row} of the batch, but in others")
        try:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"column {name!r} cannot be batched: row {row} holds {_short(value)}, not numbers"
            ) from error
        if tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        elif tensor.dtype != torch.bool:
            tensor = tensor.long()
        tensors.append(tensor.cpu())
    return _one_kind(tensors)


def _one_kind(tensors: list[Tensor]) -> list[Tensor]:
    """Rows of whole and broken numbers are all floats; an empty row says nothing."""
    floats = [t for t in tensors if t.is_floating_point() and t.numel()]
    kinds = {t.dtype for t in tensors if t.numel()}
    if len(kinds) < 2 and len({t.dtype for t in tensors}) < 2:
        return tensors
    dtype = floats[0].dtype if floats else (torch.bool if kinds == {torch.bool} else torch.long)
    return [t.to(dtype) for t in tensors]


def stack(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Rows of one shape, stacked.

    Raises:
        ValueError: shapes differ; both are named.
    """
    shapes = list(dict.fromkeys(tuple(t.shape) for t in tensors))
    if len(shapes) > 1:
        raise ValueError(
            f"column {name!r} cannot be batched: its rows have shapes {shapes[0]} and {shapes[1]}, which are neither"
            " equal nor one entry per token of input_ids; leave it out, or give a data_collator that knows it"
        )
    return torch.stack(list(tensors))


def pad(name: str, tensors: Sequence[Tensor], length: int, value: float, left: bool) -> Tensor:
    """Rows filled to one length along their first dimension.

    Raises:
        ValueError: the dimensions after the first differ.
    """
    filled = []
    for tensor in tensors:
        fill = tensor.new_full((length - tensor.shape[0], *tensor.shape[1:]), value)
        filled.append(torch.cat([fill, tensor] if left else [tensor, fill]))
    return stack(name, filled)


def per_token(tensors: Sequence[Tensor], lengths: Sequence[int]) -> bool:
    """Whether every row has one entry per token."""
    return all(t.dim() > 0 and t.shape[0] == n for t, n in zip(tensors, lengths, strict=True))


def round_up(length: int, multiple: int) -> int:
    """The least multiple that holds the length."""
    return -(-length // multiple) * multiple


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
