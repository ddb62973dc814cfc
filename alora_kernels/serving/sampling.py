"""From logits to tokens, each row by the settings and the random numbers of its own request.

What its neighbours ask for changes neither a row's arithmetic nor its random numbers, so a seed gives the same answer
in any batch (to the rounding of the logits). A number u in [0, 1) picks the token at which the summed probability
passes u.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .request import Sampling

LEAST = -9999.0  # a log probability that is told at least: JSON has no infinity


class Row(NamedTuple):
    """How one row is sampled: the request's settings, and what draws its next random number in [0, 1)."""

    sampling: Sampling
    uniform: Callable[[], float]


class NotFiniteError(ArithmeticError):
    """Logits that are NaN or infinite."""


def choose(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Tokens `[n]`, int64, of n rows with logits `[n, V]`, float32.

    Formula: softmax(logits / temperature), cut to the top_k most likely, then to the smallest set with probability
    top_p (renormalised after each cut); temperature 0 is argmax.

    If the largest logit of a row is NaN or infinite, it raises a NotFiniteError and draws no random number.
    """
    tokens = logits.argmax(-1)
    if not torch.isfinite(logits.gather(-1, tokens.unsqueeze(-1))).all():
        raise NotFiniteError("the model's output is not finite: the task or the prompt overflows")
    sampled = [i for i, row in enumerate(rows) if not row.sampling.greedy]
    for cut in (False, True):
        chosen = [i for i in sampled if _cuts(rows[i].sampling, logits.shape[-1]) == cut]
        if chosen:
            index = torch.tensor(chosen, device=logits.device)
            tokens[index] = _draw(logits[index], [rows[i] for i in chosen], cut)
    return tokens


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """(token, log of its softmax) of each row's token, then of its `top` most likely ones; in float64.

    Logits `[n, V]`, tokens `[n]`; temperature and cuts have no part in it.
    """
    known = logits.double().log_softmax(-1).clamp_min_(LEAST)
    best = known.topk(min(top, known.shape[-1]), -1)
    ids = torch.cat([tokens.unsqueeze(-1), best.indices], -1)
    return [list(zip(*row)) for row in zip(ids.tolist(), known.gather(-1, ids).tolist())]


def _cuts(sampling: Sampling, vocabulary: int) -> bool:
    return sampling.top_p < 1 or 0 < sampling.top_k < vocabulary


def _draw(logits: Tensor, rows: Sequence[Row], cut: bool) -> Tensor:
    """Tokens `[n]` of rows that all cut, or none of which does. In float64: summing 49152 in float32 loses some."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(-1)

    scaled = logits.double() / column([row.sampling.temperature for row in rows])
    order = None
    if cut:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        most = column([row.sampling.top_k or scaled.shape[-1] for row in rows])
        scaled = scaled.masked_fill(torch.arange(scaled.shape[-1], device=logits.device) >= most, -torch.inf)
    probabilities = scaled.softmax(-1)
    if cut:
        before = probabilities.cumsum(-1) - probabilities  # the first token of a row is never cut: 0 < top_p
        probabilities = probabilities.masked_fill(before >= column([row.sampling.top_p for row in rows]), 0)
    summed = probabilities.cumsum(-1)
    target = column([row.uniform() for row in rows]) * summed[:, -1:]
    picked = torch.searchsorted(summed, target, right=True).clamp_(max=summed.shape[-1] - 1)
    return (picked if order is None else order.gather(-1, picked)).squeeze(-1)
