"""The records that ops and backends hand to each other: what routes (`Adapter`), is saved, asked for, given back.

A custom op knows tensors and numbers only, so an `Adapter` also goes flat.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..records import Dropout
from ..routing import RowGroups

Flat = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float, float]
SCHEMA = "Tensor a, Tensor? router, Tensor? ids, Tensor? order, Tensor? offsets, Tensor? seed, float s, float dropout_p"
TENSORS = 6  # of the flat arguments, before the numbers


def wider(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds the numbers of all these tensors: of 16-bit and float32 ones float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


class Adapter(NamedTuple):
    """The routed half of the layer: everything between x and h."""

    a: Tensor  # [E, R, K]
    router: Tensor | None  # [E, K] for soft routing
    groups: RowGroups | None  # rows by task for task routing
    scaling: float  # s
    dropout: Dropout | None  # None when inactive

    @property
    def task_groups(self) -> RowGroups:
        """The row groups of task routing."""
        assert self.groups is not None
        return self.groups

    def flat(self) -> Flat:
        """The arguments of a custom op, as `SCHEMA` declares them; `unflatten` takes them back."""
        p, seed = (0.0, None) if self.dropout is None else self.dropout
        return self.a, self.router, *(self.groups or (None, None, None)), seed, self.scaling, p

    @classmethod
    def unflatten(cls, a: Tensor, router: Tensor | None, ids: Tensor | None, *others: Any) -> Adapter:
        """What `flat` was called on."""
        order, offsets, seed, scaling, dropout_p = others
        groups = None if ids is None else RowGroups(ids, order, offsets)
        return cls(a, router, groups, scaling, None if seed is None else Dropout(dropout_p, seed))


class Saved(NamedTuple):
    """What the forward keeps for the backward, besides x; only the backend that made p reads it."""

    h: Tensor  # [M, R], already times s; in x's dtype, on the torch backend in the wider one of x and the adapter
    p: Tensor  # [M, E*R + E] in `acc_dtype`, unscaled products beside logits (in torch the gate); empty for tasks


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    bias: bool
    b: bool
    a: bool
    router: bool


class Grads(NamedTuple):
    """Gradients of the routed half; None where not asked for."""

    dx: Tensor | None
    da: Tensor | None
    drouter: Tensor | None

    def cast_adapter(self, adapter: Adapter) -> Grads:
        """The same gradients, those of the adapter in the adapter's own dtype."""
        da = None if self.da is None else self.da.to(adapter.a.dtype)
        drouter = self.drouter
        if drouter is not None and adapter.router is not None:
            drouter = drouter.to(adapter.router.dtype)
        return Grads(self.dx, da, drouter)
