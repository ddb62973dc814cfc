"""The loss of a batch, row by row where the model's own loss is a cross entropy of its labels, and its sums by task.

Which loss a model has is not guessed: two rows of the first batch are run once with labels, and the value the model
gives is compared with the cross entropy of its logits, shifted by one token and not. What agrees with neither is left
to the model, and there is no loss per task then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .output_head import OutputHead, find_head, output_layer
from .rules import IGNORED, BatchRules
from .tasks import all_per_row

logger = logging.getLogger(__name__)

Call = Callable[[dict[str, Any]], Any]  # a batch in, the model's outputs
UNKNOWN, ALIGNED, SHIFTED, OTHER = range(4)  # verdicts on a loss; of several processes the largest counts
TRIALS = 4  # at most so many calls for a head with a label per row
FEW_CLASSES = 512  # heads that may weight their classes; a vocabulary is larger
FEW_TOKENS = 32  # of a row that is tried: 2 rows of 1024 tokens and a vocabulary of 128k are 3.2 GB of logits


class Scored(NamedTuple):
    """What one call of the model gave."""

    outputs: Any  # with logits of no class where the output layer was asked at the labels only
    mean: Tensor  # the model's loss, a mean over the labels of the batch
    losses: Tensor | None  # sum of the negative log-likelihoods of each row's labels `[B]`, for sums by task alone:
    # gradients are those of `mean`; None of another loss
    counts: Tensor  # labels of each row `[B]`
    right: Tensor | None  # whether the largest logit is right at every label `[B]`; None where `losses` is


class ModelLoss:
    """A model's own loss, taken apart by rows where it can be."""

    def __init__(self, rules: BatchRules) -> None:
        self.rules, self.shifts = rules, rules.shifts  # whether position t is compared with the label of t + 1
        # whether it is a cross entropy, and a mixture of experts' balancing loss where there is one; None: not tried
        self.by_rows: bool | None = None
        self.head: OutputHead | None = None  # asked at the labels only, where that was proven to be the same
        self.whole_because = "no model was tried"  # why all logits are computed instead; empty where they are not
        self._tried: Any = None  # the output layer of the last trial
        self._labelled = rules.needs_labels  # without labels it gives something else, or nothing

    def labels(self, inputs: Mapping[str, Any]) -> Tensor:
        """The batch's labels without those that follow no token, where the loss shifts."""
        labels: Tensor = inputs["labels"]
        per_token = labels.dim() == 2 and not labels.is_floating_point()
        return predictable(labels, inputs.get("attention_mask")) if self.shifts and per_token else labels

    def counted(self, inputs: Mapping[str, Any]) -> Tensor:
        """The labels that the loss is a mean of: one per row where it is a mean of rows (CTC)."""
        labels = self.labels(inputs)
        if not self.rules.counts_rows:
            return labels
        return labels.new_zeros(len(labels)).masked_fill(label_counts(labels) == 0, IGNORED)

    def _wants_labels(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the forward must be given the labels; some decoders make their input of them."""
        return self._labelled or (self.rules.encoder_decoder and "decoder_input_ids" not in inputs)

    def learn(
        self, call: Call, inputs: Mapping[str, Any], agree: Callable[[int], int] = int, model: Any = None
    ) -> None:
        """Find out what the model's loss is, from a few rows; nothing is drawn from the generators.

        `call` is the model, routed for the rows it gets; a batch with images or the like is run whole. `agree` gives
        the largest verdict of all processes, which must run the model equally often. With `model`, its wrappers
        included, a language model's output layer is tried too.
        """
        labels = inputs["labels"]
        again = self.by_rows and model is not None and output_layer(model) is not self._tried
        if (self.by_rows is not None and not again) or labels.is_floating_point() or labels.dim() > 2:
            return
        rows = label_counts(labels).topk(min(2, len(labels))).indices
        if labels.dim() == 1:  # one label per row: several rows, for several classes
            rows = torch.arange(max(2, len(labels)), device=labels.device) % len(labels)
        few = dict(inputs)
        if all_per_row(inputs):
            few = _few_tokens({name: value[rows] for name, value in inputs.items()})
        devices = [labels.device] if labels.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            if not again:
                outputs = call(few)
                self._settle(agree(self._compare(outputs, few["labels"])))
                if self.by_rows:
                    self._settle(agree(self._try_classes(call, few, outputs)))
                    self._try_without_labels(call, few, outputs)
            if self.by_rows and model is not None:
                self._try_head(call, few, model, agree)

    def _settle(self, verdict: int) -> None:
        self.by_rows = {UNKNOWN: None, OTHER: False}.get(verdict, True)
        self.shifts = verdict == SHIFTED if self.by_rows else self.shifts

    def _try_classes(self, call: Call, few: dict[str, Any], outputs: Any) -> int:
        """The verdict on labels of all classes in turn: a mean over labels of one class does not show its weight."""
        labels, classes = few["labels"], outputs["logits"].shape[-1]
        asked, verdict = labels != IGNORED, SHIFTED if self.shifts else ALIGNED
        step = max(1, len(labels) - 1)  # calls overlap in a class, which compares those of one with those of the next
        # as many calls whatever the rows: processes, whose numbers of rows may differ, make them together
        calls = min(TRIALS, classes - 1) if labels.dim() == 1 else int(classes <= FEW_CLASSES)
        for start in range(0, step * calls, step):
            other = labels.clone()
            other[asked] = (torch.arange(int(asked.sum()), device=labels.device) + start) % classes
            verdict = max(verdict, self._compare(call(few | {"labels": other}), other))
        return verdict

    def _try_without_labels(self, call: Call, few: dict[str, Any], outputs: Any) -> None:
        """Whether the model, asked without labels, gives what the loss is made of."""
        if self._wants_labels(few):
            return
        bare = call({name: value for name, value in few.items() if name != "labels"})
        shapes = [[getattr(_value(o, name), "shape", None) for name in ("logits", "aux_loss")] for o in (outputs, bare)]
        self._labelled = shapes[0] != shapes[1]

    def _try_head(self, call: Call, few: dict[str, Any], model: Any, agree: Callable[[int], int]) -> None:
        """Whether the output layer can be asked at the labels only, in every process."""
        self.head, self._tried = None, output_layer(model)
        try:
            if self._wants_labels(few):
                raise ValueError("the model must be called with its labels")
            head = find_head(model)
            head.prove(lambda: call({name: value for name, value in few.items() if name != "labels"}))
            self.head, why = head, ""
        except Exception as error:  # whatever it is, all logits are the way that is known to be right
            why = f"{error}" if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if agree(OTHER if why else ALIGNED) == OTHER:
            self.head, why = None, why or "another process cannot do without"
        self._tell(why)

    def _tell(self, why: str) -> None:
        if why and why != self.whole_because:
            logger.info("all logits are computed for the loss: %s", why)
        self.whole_because = why

    def head_of(self, model: Any) -> OutputHead | None:
        """The output layer as it is now, if it is the one that was proven and can still be asked by position."""
        if self.head is None:
            return None
        try:
            head = find_head(model)
            if head.module is not self._tried:
                raise ValueError("the model has another output layer than the one that was tried")
        except ValueError as why:
            self._tell(f"{why}")
            return None
        self.whole_because = ""
        return head

    def _compare(self, outputs: Any, labels: Tensor) -> int:
        """What the value of the model's loss says of it: `UNKNOWN`, `ALIGNED`, `SHIFTED` or `OTHER`."""
        own, logits, extra = (_value(outputs, name) for name in ("loss", "logits", "aux_loss"))
        if own is None or logits is None or logits.shape[:-1] != labels.shape:
            return OTHER
        classes = labels[labels != IGNORED]
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < logits.shape[-1]:
            return OTHER
        same_sum = 1e-5 if own.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(own.dtype).eps
        agreed = []
        for shifts in (False, True)[: labels.dim()]:
            aligned = next_labels(labels) if shifts else labels
            if (aligned == IGNORED).all():
                return UNKNOWN  # no label to tell by: another batch will
            by_class = logits.flatten(0, -2).to(own.dtype)  # rounded as the model rounds
            mean = self._balanced(F.cross_entropy(by_class, aligned.flatten(), ignore_index=IGNORED), extra)
            if torch.isclose(own.double(), mean.double(), rtol=same_sum):
                agreed.append(SHIFTED if shifts else ALIGNED)
        if len(agreed) == 2:
            return UNKNOWN  # uniform logits: both agree
        return agreed[0] if agreed else OTHER

    def __call__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        label_smoothing: float = 0.0,
        *,
        all_logits: bool = True,
        counts: Tensor | None = None,
    ) -> Scored:
        """The loss of a batch that holds what the forward knows, with `labels`; smoothing is for losses by rows.

        Without `all_logits` a language model's logits are computed at the labels only, or some are left out. `counts`
        are the labels of each row where rows lie side by side in one, as `packing` puts them for a model with a `head`.
        """
        known, labels = dict(inputs), self.labels(inputs)
        counts = label_counts(self.counted(inputs)) if counts is None else counts
        if not self.by_rows:
            outputs = model(**known | {"labels": labels})
            own, logits = _value(outputs, "loss"), _value(outputs, "logits")
            if own is None:
                raise ValueError(
                    "the model gives no loss for these labels: choose a class with a head for the task, or pass"
                    " compute_loss_func to the trainer"
                )
            if logits is not None and not counts.any():  # a mean over nothing is no number
                own = logits.sum() * 0.0
            return Scored(outputs, own, None, counts, None)
        if not self._wants_labels(known):
            del known["labels"]
        head = None if all_logits else self.head_of(model)
        if head is not None:
            return self._at_labels(head, lambda: model(**known), labels, counts, label_smoothing)
        chooses = self.shifts and "logits_to_keep" in (self.rules.columns or ())
        if chooses and not (all_logits or self._labelled or isinstance(model, nn.DataParallel)):
            known["logits_to_keep"] = kept_positions(labels)
            labels = labels[:, known["logits_to_keep"]]
        outputs = model(**known)
        aligned = next_labels(labels) if self.shifts else labels
        losses, right = row_losses(outputs["logits"], aligned, label_smoothing)
        mean = losses.sum() / counts.sum().clamp_min(1)
        return Scored(outputs, self._balanced(mean, _value(outputs, "aux_loss")), losses, counts, right)

    def _at_labels(
        self, head: OutputHead, call: Callable[[], Any], labels: Tensor, counts: Tensor, label_smoothing: float
    ) -> Scored:
        """As `__call__`, with the logits of labelled positions alone."""
        outputs, given = head.capture(call)
        aligned = next_labels(labels) if self.shifts else labels
        found = head.losses(given, aligned, label_smoothing)
        rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)  # labels come row after row
        losses = found.losses.new_zeros(len(counts)).index_add(0, rows, found.losses)
        wrong = torch.zeros_like(counts).index_add(0, rows, (~found.right).to(counts.dtype))
        mean = self._balanced(found.total / counts.sum().clamp_min(1), _value(outputs, "aux_loss"))
        return Scored(outputs, mean, losses, counts, wrong == 0)

    def _balanced(self, mean: Tensor, extra: Tensor | None) -> Tensor:
        """A mean with the balancing loss of a mixture of experts, where the model gives one."""
        return mean if extra is None else mean + self.rules.balancing * extra


def row_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """`Scored.losses` and `.right` of logits `[B, T, V]` or `[B, V]` and labels of the same places, -100 for none."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} cannot be aligned: they"
            " must have the same rows and positions; nothing in a batch may have another first dimension than its rows"
        )
    # classes last: in the middle, torch's gradient on a CPU is 36 times as far off (49,152 classes)
    by_class, flat = logits.flatten(0, -2).float(), labels.flatten()
    losses = F.cross_entropy(by_class, flat, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing)
    right = (logits.argmax(-1) == labels) | (labels == IGNORED)
    rows = len(labels)
    return losses.view(rows, -1).sum(1), right.view(rows, -1).all(1)


def label_counts(labels: Tensor) -> Tensor:
    """How many labels each row has, `[B]`: those that are not -100, and every float."""
    asked = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED
    return asked.reshape(len(labels), -1).sum(1)


def next_labels(labels: Tensor) -> Tensor:
    """Labels `[B, T]` moved to where a language model predicts them: place t asks for the label of t + 1."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def predictable(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Labels `[B, T]` without those that follow no token of their row: the first, and the first after padding."""
    before = torch.ones_like(labels) if attention_mask is None or attention_mask.dim() != 2 else attention_mask
    return labels.masked_fill(F.pad(before[:, :-1], (1, 0)) == 0, IGNORED)


def kept_positions(labels: Tensor) -> Tensor:
    """Positions whose logits a language model is asked for: from before the first label of any row to the last.

    Positions, not their number: a slice of the hidden states would send the output layer down a path that copies its
    weight for every row (13 % of a training step of SmolLM2 on a CPU).
    """
    length = labels.shape[1]
    asked = (labels != IGNORED).any(0).nonzero()
    first, last = (int(asked[0]), int(asked[-1])) if len(asked) else (length - 1, length - 1)
    return torch.arange(max(first, 1) - 1, last + 1, device=labels.device)


def _few_tokens(few: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last tokens of each row up to its last label, where everything is one entry per token or per row."""
    labels = few["labels"]
    if labels.dim() != 2 or any(v.dim() > 2 or (v.dim() == 2 and v.shape != labels.shape) for v in few.values()):
        return few
    length = labels.shape[1]
    width = min(length, FEW_TOKENS)
    places = torch.arange(length, device=labels.device)
    last = torch.where(label_counts(labels) > 0, places.where(labels != IGNORED, 0).amax(1), length - 1)
    columns = (last[:, None] - width + 1).clamp_min(0) + places[:width]
    return {name: value.gather(1, columns) if value.dim() == 2 else value for name, value in few.items()}


def _value(outputs: Any, name: str) -> Tensor | None:
    """A plain tuple begins with the loss."""
    if isinstance(outputs, tuple):
        return outputs[0] if name == "loss" else None
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, Tensor) else None


class TaskSums:
    """Sums over rows by task; rows without a label and rows of the base alone are in none of them."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.rows = tuple(names), 0
        self._sums = torch.zeros(5, len(self.names), dtype=torch.float64)  # rows as `add` stacks them
        self._unlabelled = torch.zeros((), dtype=torch.long)

    def add(self, task_ids: Tensor, counts: Tensor, losses: Tensor | None, right: Tensor | None) -> None:
        """Add a batch, as `Scored` has it; with an id per token its rows belong to no one task."""
        self.rows += len(counts)
        self._unlabelled = self._unlabelled.to(counts.device) + (counts == 0).sum()
        if losses is None or right is None or task_ids.shape != counts.shape:
            return
        known = (task_ids >= 0) & (counts > 0)
        losses, counts = losses.detach()[known].double(), counts[known].double()
        batch = torch.stack([losses, counts, losses / counts, right[known].double(), torch.ones_like(counts)])
        self._sums = self._sums.to(batch.device).index_add(1, task_ids[known], batch)

    def sum_over(self, accelerator: Any) -> None:
        """Add up the batches of all processes, which must all call this."""
        if accelerator.num_processes > 1:
            self._sums = accelerator.reduce(self._sums.to(accelerator.device), "sum")

    @property
    def unlabelled(self) -> int:
        """Rows whose labels are all masked."""
        return int(self._unlabelled)

    def logs(self) -> dict[str, float]:
        """Mean loss per label of each task that came."""
        columns = zip(self.names, self._sums.T.tolist(), strict=True)
        return {f"loss_{name}": loss / labels for name, (loss, labels, *_) in columns if labels}

    def metrics(self) -> dict[str, float]:
        """Loss per label and exact-match accuracy of each task, rows alike, and the means of both over tasks."""
        found: dict[str, float] = {}
        each = []
        for name, (_, _, means, right, rows) in zip(self.names, self._sums.T.tolist(), strict=True):
            if rows:
                each.append((means / rows, right / rows))
                found |= {f"loss_{name}": means / rows, f"accuracy_{name}": right / rows}
        overall = (sum(column) / len(each) for column in zip(*each, strict=True))
        return found | dict(zip(("mean_loss", "accuracy"), overall, strict=True)) if each else {}
