"""The few records that ops and backends hand to each other.

In:   the flat arguments of a custom op (the dispatcher knows tensors and numbers only).
Out:  the same things under their names: what routes (`Adapter`), what is saved (`Saved`), what is asked
      for (`Needs`) and what comes back (`Grads`).
Who:  `library` builds them, `torch_backend` and `triton_backend` read them.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from ..routing import RowGroups


def acc_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of x are summed and the softmax is taken."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wider(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that holds the numbers of all these tensors: of 16-bit and float32 ones float32."""
    return reduce(torch.promote_types, (t.dtype for t in tensors if t is not None))


class Dropout(NamedTuple):
    """Dropout of the low-rank path's input: the mask is a function of the seed alone.

    Attributes:
        p: probability that an entry is dropped.
        seed: one int64, drawn from torch's generator of x's device.
    """

    p: float
    seed: Tensor


class Adapter(NamedTuple):
    """The routed half of the layer: everything between x and h.

    Attributes:
        a: `[E, R, K]`.
        router: `[E, K]` for soft routing, else None.
        groups: rows by task for task routing, else None.
        scaling: s.
        dropout: None when inactive.
    """

    a: Tensor
    router: Tensor | None
    groups: RowGroups | None
    scaling: float
    dropout: Dropout | None

    @property
    def task_groups(self) -> RowGroups:
        """The row groups of task routing."""
        assert self.groups is not None
        return self.groups


class Member(NamedTuple):
    """One of several layers that read the same x.

    Attributes:
        w: frozen weight `[N, K]`.
        bias: `[N]`, or None.
        adapter: the routed half; groups and dropout are the same for all members.
        b: the member's B `[N, R]`.
    """

    w: Tensor
    bias: Tensor | None
    adapter: Adapter
    b: Tensor


class Saved(NamedTuple):
    """What the forward keeps for the backward, besides x.

    Attributes:
        h: `[M, R]`, already times s; in x's dtype, on the torch backend in the wider one of x and the adapter.
        p: skinny products, unscaled, and logits `[M, E*R + E]` in `acc_dtype`; empty for task routing. Only the
            backend that made it reads it (torch keeps the gate where the logits were).
    """

    h: Tensor
    p: Tensor


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    a: bool
    router: bool
    b: bool
    bias: bool


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
