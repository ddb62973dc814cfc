"""From rows of a tokenised dataset, of different lengths, to one padded batch that mixes tasks, and the tasks' ids.

A row's logits must not depend on its neighbours. Encoders read their first position, so they are padded on the right;
language models that can be told positions are padded on the left, so that answers end in the last columns and the
vocabulary-sized logits are computed there only. `BatchRules` says which.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..modules.adapter import task_ids_from_names
from .rules import IGNORED, BatchRules

FILL = {"special_tokens_mask": 1}  # what is no token counts as special; every other column is filled with 0
LABELS = ("labels", "label", "label_ids")  # as transformers' own collators read them


class TaskCollator:
    """Pad rows as the model needs it and turn task names into ids.

    Args:
        pad_token_id: fills `input_ids`; None takes the model's own, or 0: padding is masked.
        tasks: names, in the order of the model's ids; none for a model that takes no ids.
        model: it, or its `BatchRules`, says on which side to pad, whether to send positions, which columns to keep and
            what labels mean. Without it rows are padded on the left, as for a causal language model, and every column
            of numbers is kept.
        pad_to_multiple_of: round the length up, for fewer shapes under `torch.compile`.
        ids_name: the ids' name in the batch. The default is for `ALoRATrainer` and for loops that call
            `alora_kernels.route(batch.pop("task_ids"))`. transformers' own Trainer hands every entry to the model,
            where a PEFT model reads "adapter_names"; it needs `remove_unused_columns=False` to keep the column `task`.

    Returns (of a call):
        `input_ids`, `attention_mask` and other columns per token `[B, T, ...]`, columns per row `[B, ...]`, `labels`
        (`[B]` classes or values, `[B, C]` for several per row, `[B, T]` with -100 where nothing is asked),
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
        self.rules = BatchRules.of(model)
        self.pad_token_id = pad_token_id if pad_token_id is not None else self.rules.pad_token_id or 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch."""
        for feature in features:
            for key in ("input_ids", "task") if self.tasks else ("input_ids",):
                if key not in feature:
                    raise KeyError(f"a feature has no {key!r}, only {', '.join(feature)}")
        rows = _tensors("input_ids", [f["input_ids"] for f in features])
        for row, ids in enumerate(rows):
            if ids.dim() != 1 or not len(ids):
                raise ValueError(
                    f"input_ids of row {row} of the batch have shape {tuple(ids.shape)}, not one token or more"
                )
        lengths, input_ids = [len(ids) for ids in rows], self._pad("input_ids", rows, self.pad_token_id)
        if self.rules.leaks and min(lengths) < input_ids.shape[1]:
            warnings.warn(
                f"layers of {self.rules.leaks} let padding change the tokens beside it: rows are not scored as they are"
                " alone, unless all rows of a batch have one length",
                stacklevel=2,
            )
        batch = {"input_ids": input_ids, **self._mask(features, lengths, input_ids.shape[1])}
        for name in dict.fromkeys(name for feature in features for name in feature):
            if name not in ("input_ids", "attention_mask", "task", *LABELS):
                column = self._column(name, [f.get(name) for f in features], lengths)
                batch |= {} if column is None else {name: column}
        labels = next((name for name in LABELS if features[0].get(name) is not None), None)
        if labels is not None:
            batch["labels"] = self._labels(labels, [f.get(labels) for f in features], lengths)
        if self.tasks:
            batch[self.ids_name] = task_ids_from_names([f["task"] for f in features], self.tasks)
        return batch

    def _pad(self, name: str, tensors: Sequence[Tensor], value: float, *, right: bool = False) -> Tensor:
        """Rows filled along their first dimension, on the rules' side or the right, to the least multiple."""
        length = -(-max(len(tensor) for tensor in tensors) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        left, filled = self.rules.pad_left and not right, []
        for tensor in tensors:
            fill = tensor.new_full((length - len(tensor), *tensor.shape[1:]), value)
            filled.append(torch.cat([fill, tensor] if left else [tensor, fill]))
        return _stack(name, filled)

    def _mask(self, features: Sequence[Mapping[str, Any]], lengths: Sequence[int], length: int) -> dict[str, Tensor]:
        """`attention_mask`, and the positions that follow from it where padding is on the left."""
        if not self.rules.takes("attention_mask"):
            if not self.rules.causal and any(n != length for n in lengths):
                raise ValueError(
                    f"the model takes no attention_mask, so padding would change a row of {min(lengths)} tokens beside"
                    f" {length}: use batches of rows of one length"
                )
            return {}
        given = [f.get("attention_mask") for f in features]
        masks = _tensors("attention_mask", [[1] * n if m is None else m for n, m in zip(lengths, given, strict=True)])
        if any(m.dim() != 1 for m in masks) or not _per_token(masks, lengths):
            raise ValueError("attention_mask must have one entry per token of input_ids in every row")
        mask = self._pad("attention_mask", [m.long() for m in masks], 0)
        if self.rules.pad_left and self.rules.positions and "position_ids" not in features[0]:
            return {"attention_mask": mask, "position_ids": positions(mask)}
        return {"attention_mask": mask}

    def _column(self, name: str, values: list[Any], lengths: Sequence[int]) -> Tensor | None:
        """One of the other columns as a tensor, None where the model has no use for it."""
        said = next((value for value in values if value is not None), None)
        if not self.rules.takes(name) or said is None or (self.rules.columns is None and isinstance(said, str)):
            return None
        tensors = _tensors(name, values)
        if name.startswith("decoder_") and all(t.dim() for t in tensors):  # a sequence of its own
            return self._pad(name, tensors, self.pad_token_id if name == "decoder_input_ids" else 0, right=True)
        return self._pad(name, tensors, FILL.get(name, 0)) if _per_token(tensors, lengths) else _stack(name, tensors)

    def _labels(self, name: str, values: list[Any], lengths: Sequence[int]) -> Tensor:
        """Labels in the form the model's own loss takes: of rows, of tokens, or a sequence of their own."""
        tensors, rules = _tensors(name, values), self.rules
        if len({t.dim() for t in tensors}) > 1:
            raise ValueError(f"column {name!r} mixes single labels and lists of labels")
        if tensors[0].dim() == 0 or rules.labels is not None:
            return _labels_of_rows(_stack(name, tensors), rules)
        tensors = [t.long() if t.dtype == torch.bool else t for t in tensors]
        if rules.encoder_decoder:
            return self._pad(name, tensors, IGNORED, right=True)
        floats = tensors[0].is_floating_point()
        if not _per_token(tensors, lengths):
            if floats:
                return _stack(name, tensors)
            row = next(i for i, t in enumerate(tensors) if len(t) != lengths[i])
            raise ValueError(
                f"column {name!r} of row {row} of the batch has {len(tensors[row])} labels for {lengths[row]} tokens of"
                " input_ids: give one per token with -100 where nothing is asked, or one per row; several per row (a"
                " classifier's) and a sequence of their own (an encoder-decoder's) need TaskCollator(..., model=model)"
            )
        labels = self._pad(name, tensors, IGNORED)
        if floats and any(n != labels.shape[1] for n in lengths):
            raise ValueError(
                f"column {name!r} holds floats per token, for which there is no value that a loss ignores: use batches"
                " of rows of one length"
            )
        if rules.shifts:  # nothing comes before a first token but padding
            starts = torch.tensor([labels.shape[1] - n if rules.pad_left else 0 for n in lengths])
            labels[torch.arange(len(lengths)), starts] = IGNORED
        return labels


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token among those of its row that are no padding, `[B, T]`."""
    return (attention_mask.cumsum(1) - 1).clamp_min(0)


def _labels_of_rows(labels: Tensor, rules: BatchRules) -> Tensor:
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


def _tensors(name: str, values: Sequence[Any]) -> list[Tensor]:
    """Each row's value as a tensor: whole numbers int64, others in torch's default float, truth values as they are."""
    tensors: list[Tensor] = []
    for row, value in enumerate(values):
        if value is None:
            raise ValueError(f"column {name!r} has no value in row {row} of the batch, but in others")
        try:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError) as error:
            text = repr(value)
            text = text if len(text) <= 40 else text[:37] + "..."
            raise ValueError(f"column {name!r} cannot be batched: row {row} holds {text}, not numbers") from error
        if tensor.is_floating_point():
            tensor = tensor.to(torch.get_default_dtype())
        elif tensor.dtype != torch.bool:
            tensor = tensor.long()
        tensors.append(tensor.cpu())
    kinds = {t.dtype for t in tensors if t.numel()}  # an empty row says nothing
    if len(kinds) < 2 and len({t.dtype for t in tensors}) < 2:
        return tensors
    floats = [kind for kind in kinds if kind.is_floating_point]  # beside them whole numbers are floats too
    dtype = floats[0] if floats else torch.bool if kinds == {torch.bool} else torch.long
    return [t.to(dtype) for t in tensors]


def _stack(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """Rows of one shape, stacked."""
    shapes = list(dict.fromkeys(tuple(t.shape) for t in tensors))
    if len(shapes) > 1:
        raise ValueError(
            f"column {name!r} cannot be batched: its rows have shapes {shapes[0]} and {shapes[1]}, which are neither"
            " equal nor one entry per token of input_ids; leave it out, or give a data_collator that knows it"
        )
    return torch.stack(list(tensors))


def _per_token(tensors: Sequence[Tensor], lengths: Sequence[int]) -> bool:
    """Whether every row has one entry per token."""
    return all(t.dim() > 0 and t.shape[0] == n for t, n in zip(tensors, lengths, strict=True))


class WithTasks:
    """A collator that knows nothing of tasks, beside a column `task`.

    It gives the collator's batch and `task_ids`: `[B]`, `[2 B]` for TRL's pairs, or `[1, T]` with an id per token where
    all rows are put in one. A row that was packed before has lists `task` and `seq_lengths`. The inner collator, one of
    transformers' say, gets the rows without `task`, unless it asks for it; with `rules`, a tokenizer that pads where
    the model cannot bear it is warned of.
    """

    def __init__(self, collator: Any, tasks: Sequence[str], rules: BatchRules | None = None) -> None:
        self.collator, self.tasks = collator, tuple(tasks)
        self.tokenizer = getattr(collator, "tokenizer", None)  # which Trainer saves with the model
        side = getattr(self.tokenizer, "padding_side", None)
        if rules is not None and side == "left" and not (rules.pad_left or rules.positions):
            warnings.warn(
                f"the data_collator pads on the left, but {rules.model} cannot be told positions:"
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
        batch["task_ids"] = self._ids(features, batch)
        return batch

    def _ids(self, features: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> Tensor:
        """An id per row of the batch, or per token where rows were joined."""
        packed = any(isinstance(f["task"], list) for f in features)
        alone = [(f["task"], len(f.get("input_ids", ()))) for f in features]
        texts = [text for row, f in enumerate(features) for text in _texts(row, f)] if packed else alone
        names, lengths = zip(*texts, strict=True)
        ids = task_ids_from_names(names, self.tasks)
        inputs = next((v for k, v in batch.items() if k == "input_ids" or isinstance(v, Tensor)), None)
        shape = tuple(getattr(inputs, "shape", ()))
        if not packed and (not shape or shape[0] == len(features)):
            _check_order(features, batch)
            return ids
        if not packed and shape[0] == 2 * len(features) and {"chosen", "chosen_ids"} & features[0].keys():
            return ids.repeat(2)  # of TRL's pairs, all that were chosen before all that were rejected
        if shape[:1] == (1,) and isinstance(inputs, Tensor) and all("input_ids" in f for f in features):
            given = torch.cat([torch.as_tensor(f["input_ids"]) for f in features]).to(inputs)
            if torch.equal(inputs[0, : len(given)], given):  # a collator may fill up on the right
                each = ids.repeat_interleave(torch.tensor(lengths))
                return F.pad(each, (0, inputs.shape[1] - len(each)), value=-1)[None]
        raise ValueError(
            f"the data_collator made a batch of shape {shape} from {len(features)} rows: which task each part belongs"
            " to is not known; let it return `task_ids`, one per row or per token"
        )


def _check_order(features: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> None:
    """Raise a ValueError if a row of the batch has the tokens of another row than its own, as after sorting."""
    inputs, mask = batch.get("input_ids"), batch.get("attention_mask")
    if (
        not isinstance(inputs, Tensor)
        or not isinstance(mask, Tensor)
        or inputs.shape != mask.shape
        or inputs.dim() != 2
    ):
        return
    given = [list(f["input_ids"]) if "input_ids" in f else None for f in features]
    for row, (ids, real) in enumerate(zip(inputs.tolist(), mask.tolist(), strict=True)):
        tokens = [token for token, known in zip(ids, real, strict=True) if known]
        if tokens != given[row] and tokens in given:  # other tokens than anybody's, masked ones, say, tell nothing
            raise ValueError(
                f"the data_collator put row {given.index(tokens)} of a batch into the place of row {row}: let it keep"
                " their order, or return `task_ids`"
            )


def _texts(row: int, feature: Mapping[str, Any]) -> list[tuple[Any, int]]:
    """Task and length of each text in a packed row, whose `task` is a list."""
    tasks, lengths, tokens = feature["task"], feature.get("seq_lengths") or [], len(feature["input_ids"])
    if not isinstance(tasks, list) or len(tasks) != len(lengths) or sum(lengths) != tokens:
        raise ValueError(
            f"row {row} of the batch has {tokens} tokens, `task` {tasks!r} and `seq_lengths` {lengths!r}: a packed row"
            " has a list of tasks and as many lengths, which add up to its tokens"
        )
    return list(zip(tasks, lengths, strict=True))
