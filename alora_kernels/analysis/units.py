"""One thing to compare: a task of an adapter, an adapter, or a client, with its matrices on demand.

In:   what `sources` found in a folder.
Out:  `Unit`, and `Loaded`, the matrices of one of its modules.
Who:  `sources` makes them, `measure` and `study` read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

# kinds that readers of a unit ask for
HYDRA, SOFT = "HydraLoRA, one expert", "ALoRA, one expert"


class Update(NamedTuple):
    """The change of a weight, s B A: a `[R, K]`, b `[N, R]`, and s, or None where the folder does not say."""

    a: Tensor
    b: Tensor
    s: float | None


class Loaded(NamedTuple):
    """One module of one unit: its matrices by part, and what they do to the weight, if it is s B A."""

    parts: dict[str, Tensor]
    update: Update | None


@dataclass(frozen=True, eq=False)
class Unit:
    """Something to compare: one task of an adapter, one adapter, or one client.

    Attributes:
        names: from the most special to the most general: task or client, folder, its parents.
        kind: what it is, in words.
        folder: where it lies.
        base: the base model's name, if the folder gives it.
        shapes: module -> part -> shape. Parts are A and B; router, an expert's row of it, of soft ALoRA; lambda_d and
            lambda_b of VeRA; A, M, B1, B2 and B of clients with unequal ranks.
        read: module -> `Loaded`.
        shared: parts that all units of the same folder hold as one matrix.
        why: where there are no shapes, the reason.
    """

    names: tuple[str, ...]
    kind: str
    folder: Path
    base: str | None
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    read: Callable[[str], Loaded] = field(repr=False)
    shared: frozenset[str] = frozenset()
    why: str = ""

    @property
    def name(self) -> str:
        """The task, the client or the folder."""
        return self.names[0]

    @property
    def rank(self) -> int | None:
        """The largest rank of any A; None without one."""
        return max((parts["A"][0] for parts in self.shapes.values() if "A" in parts), default=None)
