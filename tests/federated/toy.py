"""A federated problem small enough to follow by hand: linear regression, one adapted layer, full batches, plain SGD.

Every client has its own rows and its own target matrix. With the frozen weight zero the model is the adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alora_kernels.federated import FedConfig, Limits, Outcome, Participant, Template, adapt, fingerprint, run

K, N, ROWS = 4, 3, 8
LR = 0.02  # a step at which no method diverges in six steps
NAMES = ("ann", "bob", "cyd")
Change = Callable[[Participant], Participant]


class Net(nn.Module):
    """One linear layer `proj`, and optionally a head."""

    def __init__(self, head: bool = False, out_features: int = N) -> None:
        super().__init__()
        self.proj = nn.Linear(K, out_features, bias=False).double()
        rng = np.random.default_rng(7)
        with torch.no_grad():
            self.proj.weight.copy_(torch.from_numpy(rng.normal(size=(N, K))[:1].repeat(out_features, 0)))
        if head:
            self.head = nn.Linear(out_features, N).double()
            nn.init.eye_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.proj(x)
        return self.head(y) if hasattr(self, "head") else y


def data_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """x `[rows, K]` and target `[rows, N]` of a client; clients differ in how many rows they have."""
    rng = np.random.default_rng(NAMES.index(name) + 100)
    rows = ROWS + 2 * NAMES.index(name)
    x = rng.normal(size=(rows, K))
    return x, x @ rng.normal(size=(K, N))


def loss_of(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over rows of half the squared error."""
    return 0.5 * (model(x) - target).square().sum(1).mean()


def participant(config: FedConfig, name: str, *, head: bool = False) -> Participant:
    """One client: two full-batch SGD steps a round; its metric is the negative loss."""
    x, target = (torch.from_numpy(a) for a in data_of(name))
    heads = ("head",) if head else ()
    base = Net(head)
    mark = fingerprint(base, heads=heads)
    sizes = {"rank": config.rank_of(name), "lora_alpha": config.lora_alpha, "d_m": config.d_m}
    model = adapt(base, config.spec, **sizes, heads=heads, seed=config.seed, client=name)

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
        for _ in range(2):
            optimizer.zero_grad()
            loss_of(model, x, target).backward()
            optimizer.step()

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"score": -float(loss_of(model, x, target))}

    return Participant(name, model, train, evaluate, len(x), mark)


def template(config: FedConfig) -> Template:
    """What the server knows, whatever the clients are like."""
    base = Net()
    mark = fingerprint(base)
    return Template(adapt(base, config.spec, rank=config.rank, d_m=config.d_m, seed=config.seed), mark)


def config(folder: Path, method: str = "fed-alora", **changes: object) -> FedConfig:
    """A run of the three clients, three rounds."""
    values: dict = {
        "method": method,
        "clients": [{"name": name} for name in NAMES],
        "rounds": 3,
        "rank": 2,
        "d_m": 3,
        "metrics": ("score",),
        "guard": Limits(quorum=2, deadline=30.0),
        "output": folder,
    }
    return FedConfig.model_validate(values | changes)


def go(config: FedConfig, spoil: Mapping[str, Change] | None = None, *, head: bool = False, **how: Any) -> Outcome:
    """A run in which every client is fresh and the named ones are changed; more goes to `run`."""

    def make(name: str) -> Participant:
        made = participant(config, name, head=head)
        return spoil[name](made) if spoil and name in spoil else made

    return run(config, make, **how)


def same(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> None:
    """Equal keys and equal bits."""
    assert left.keys() == right.keys()
    for key, values in left.items():
        np.testing.assert_array_equal(values, right[key], err_msg=key)
