"""A participant: one client's model, its private data behind two functions, and nothing else.

In:   an adapted model (`adapters.adapt`), a function that trains it for one round, one that judges it.
Out:  a `Participant` for `client.client_app`; `fit`, a local training loop for those who have none.
Who:  the command line and the examples make participants; users make their own.

Data stays behind `train` and `evaluate`: the federated code calls them and never sees a row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Participant:
    """What one client brings.

    Attributes:
        name: its name, the same in every round and after a restart.
        model: frozen base with the method's adapter; its trained values are replaced before every use, so
            participants in one process may not share it.
        train: trains the model it gets for one round, with a fresh optimiser; draws its batches from torch's
            generator, which is seeded with (seed, name, round).
        evaluate: metrics of the model it gets, on the client's own test data; the same names for every client.
        num_examples: rows it trains on, its weight in the mean.
        base: `adapters.fingerprint` of the base before it was adapted.
    """

    name: str
    model: nn.Module
    train: Callable[[nn.Module], Any]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    num_examples: int
    base: str


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
) -> float:
    """One round of local training with a fresh AdamW.

    Args:
        model: in any mode; it is put in training mode and left in evaluation mode.
        batches: the batches of this round.
        loss: the loss of one batch.
        lr: learning rate.
        weight_decay: AdamW's.

    Returns:
        The mean loss over the batches.

    Raises:
        ValueError: no batch.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    losses = []
    model.train()
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.detach())
    model.eval()
    if not losses:
        raise ValueError("a round of local training needs at least one batch")
    return float(torch.stack(losses).mean())


def shuffled(rows: int, steps: int, batch_size: int) -> Iterator[Tensor]:
    """Row numbers of `steps` batches, without replacement within an epoch, from torch's generator.

    Raises:
        ValueError: rows, steps or batch_size below one.
    """
    if min(rows, steps, batch_size) < 1:
        raise ValueError(f"rows, steps and batch_size must be >= 1, got {rows}, {steps}, {batch_size}")
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(rows)])
        batch, left = left[:batch_size], left[batch_size:]
        yield batch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators seeded inside, and as they were outside."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
