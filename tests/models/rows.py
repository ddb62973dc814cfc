"""Rows as a user's data set has them, for each kind of model.

In:   the kind of rows, their lengths and tasks.
Out:  one dict per row, unpadded, with `labels` and `task`; and the same row as a batch of one.
Who:  `judge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .case import EOS, LABELS, VOCAB, Case

IMAGE = VOCAB - 1  # the token that stands for a patch of an image
PATCHES = 4  # of an image of 8 x 8 pixels
FIRST = 4  # ids below are special


def make_rows(case: Case, lengths: Sequence[int], tasks: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """Rows of these lengths, one task each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        _row(case.rows, length, number, generator) | {"task": task}
        for number, (length, task) in enumerate(zip(lengths, tasks, strict=True))
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
