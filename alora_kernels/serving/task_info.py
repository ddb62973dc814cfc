"""What the task store tells others: a task as it is now, and the right to use its slot.

In:   the store's records.
Out:  frozen `TaskInfo` and `Lease`.
Who:  `TaskStore` hands them out; the engine, the HTTP server and the command line read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapters.cards import TaskCard
from .placement import Where


@dataclass(frozen=True)
class TaskInfo:
    """A task as it is now.

    Attributes:
        name: of the task.
        version: grows with every load of the store.
        folder: it was read from.
        where: on the device, in host memory or on the disk.
        in_use: running requests that use this version.
        bytes: of its A's in all layers.
        loaded_at: unix time.
        card: how it was asked in training; None if the folder does not say.
    """

    name: str
    version: int
    folder: Path
    where: Where
    in_use: int
    bytes: int
    loaded_at: float
    card: TaskCard | None = None


@dataclass(frozen=True, eq=False)  # two leases of one version are two leases
class Lease:
    """One request's right to a slot.

    Attributes:
        slot: the id to route the request's tokens to.
        name: of the task.
        version: of the task.
    """

    slot: int
    name: str
    version: int
