"""The cross entropy of a batch, row by row.

In:   logits and labels as `TaskCollator` pads them.
Out:  loss and number of labels of each row, and whether its first choices are right.
Who:  `ALoRATrainer` for its loss and logs, `evaluate` for answers that are texts.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .collator import IGNORED


def row_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the negative log-likelihoods of each row's labels.

    Args:
        logits: `[B, T, V]` of a language model, of the last T positions where the labels have more; `[B, V]` of a
            classifier.
        labels: `[B, T']` with -100 where nothing is asked, position t names token t; `[B]` for a classifier.
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Returns:
        Losses `[B]`, numbers of labels `[B]`, and `[B]` whether the largest logit is right at every label.
    """
    counts = (labels != IGNORED).view(labels.shape[0], -1).sum(1)
    if labels.dim() == 2:  # position t predicts token t + 1
        logits, labels = logits[:, :-1], labels[:, 1:][:, -(logits.shape[1] - 1) :]
    else:
        logits, labels = logits.unsqueeze(1), labels.unsqueeze(1)
    losses = F.cross_entropy(
        logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none", label_smoothing=label_smoothing
    )
    right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
    return losses.sum(1), counts, right
