"""Which rows of a batch meet which matrix A, in torch calls: the row layouts of the torch backend.

A product of a few rows takes 3 us and the calls around it 12, so for small batches a layout saves calls. It is chosen
by the number of rows of each task, never by what x or A hold, and kept for the batch's other layers: working it out
takes 30 to 80 us, a fifth of a 768 x 768 layer with 32 rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..routing import RowGroups

Rows = slice | Tensor
SHORTEST_RUN = 16  # mean rows per run from which a product per run is cheaper than gathering each task's rows,
NARROW = 512  # of rows of so many numbers; of narrower ones twice as many
SHORTEST_HALF = 64  # the same of 16-bit factors, of which a small product takes three times as long
PADDING = 16  # unused slots per task that cost as much as a product of the task's own


class Whole(NamedTuple):
    """Every row belongs to this task: no rows need to be picked."""

    task: int


class Slots(NamedTuple):
    """The rows of several tasks padded to equal numbers, `[T, C]`: a line of C slots for each of the T tasks present.

    A free slot repeats the last row of its own task, so what is not a number in the A or the rows of a task stays in
    that task. Results from free slots are not collected.
    """

    tasks: Tensor | None  # numbers of the tasks present [T], or None where all E are
    lines: int  # T
    source: Tensor  # the row in each slot [T * C]
    rows: Tensor  # row numbers, task by task [L]; base-only rows are not among them
    taken: Tensor | None  # the slot of each of these rows [L], or None where no slot is free
    back: Tensor | None = None  # the slot of every row of the batch [M], or None where some rows have no task

    def matrices(self, a: Tensor) -> Tensor:
        """The A of the tasks present, `[T, R, K]`."""
        return a if self.tasks is None else a.index_select(0, self.tasks)

    def lay(self, t: Tensor) -> Tensor:
        """Rows of t `[M, D]` in their slots, `[T, C, D]`."""
        return t.index_select(0, self.source).view(self.lines, -1, t.shape[1])

    def lay_once(self, t: Tensor) -> Tensor:
        """The same with zeros in free slots: for sums over a task's rows."""
        if self.taken is None:
            return self.lay(t)
        slots = t.new_zeros(self.source.numel(), t.shape[1])
        slots.index_copy_(0, self.taken, t.index_select(0, self.rows))
        return slots.view(self.lines, -1, t.shape[1])

    def collect(self, slots: Tensor) -> Tensor:
        """What lies in the taken slots of `[T, C, D]`, `[L, D]` in the order of `rows`."""
        flat = slots.flatten(0, 1)
        return flat if self.taken is None else flat.index_select(0, self.taken)


Layout = Whole | Slots | list[tuple[int, Rows]]  # the last: one product for each task and its rows


_layouts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # gone with the batch's tensors


def layout_of(groups: RowGroups, k: int = NARROW, dtype: torch.dtype = torch.float32) -> Layout:
    """The cheapest layout for rows of K numbers, worked out once: all layers of a batch hand in the same tensors.

    `dtype` is that of the products. Base-only rows are in no layout, and neither are ids that name no task.
    """
    state = [0 if t.is_inference() else t._version for t in groups]
    known = _layouts.get(groups.offsets)
    if known is None or known[0] != state:
        known = _layouts[groups.offsets] = (state, {})
    layouts: dict[int, Layout] = known[1]
    shortest = SHORTEST_HALF if dtype.itemsize == 2 else SHORTEST_RUN if k >= NARROW else 2 * SHORTEST_RUN
    if shortest not in layouts:
        layouts[shortest] = _cheapest(groups, shortest)
    return layouts[shortest]


def _cheapest(groups: RowGroups, shortest: int) -> Layout:
    """A layout by the number of rows of each task; `shortest` is the mean run that is a product of its own."""
    bounds = groups.offsets.tolist()
    present = [(task, start, stop) for task, (start, stop) in enumerate(pairwise(bounds)) if start < stop]
    total, rows = groups.ids.numel(), bounds[-1] - bounds[0]
    if len(present) == 1 and rows == total:
        return Whole(present[0][0])
    if shortest * len(present) <= total:
        tasks, lengths = torch.unique_consecutive(groups.ids, return_counts=True)
        if shortest * tasks.numel() <= total:
            return _runs(tasks.tolist(), lengths.tolist(), len(bounds) - 1)
    width = max((stop - start for _, start, stop in present), default=0)
    if len(present) > 1 and width * len(present) - rows <= PADDING * len(present):
        return _slots(groups, present, width, len(bounds) - 1)
    return [(task, groups.order[start:stop]) for task, start, stop in present]


def _runs(tasks: list[int], lengths: list[int], num_tasks: int) -> list[tuple[int, Rows]]:
    """Each run of equal ids as a slice: a batch of sequences has a run per sequence, and a task may come again."""
    found: list[tuple[int, Rows]] = []
    start = 0
    for task, length in zip(tasks, lengths, strict=True):
        if 0 <= task < num_tasks:
            found.append((task, slice(start, start + length)))
        start += length
    return found


def _slots(groups: RowGroups, present: list[tuple[int, int, int]], width: int, num_tasks: int) -> Slots:
    """The slots of these tasks, each `(task, start, stop)` in the order of the rows."""
    bounds = torch.tensor(present, dtype=torch.int64, device=groups.order.device)
    tasks, starts, stops = bounds.unbind(1)
    rows = groups.order[present[0][1] : present[-1][2]].long()
    some = None if len(present) == num_tasks else tasks
    if len(present) * width == rows.numel():
        return Slots(some, len(present), rows, rows, None, _inverse(rows, groups.ids.numel()))
    # [T, C]: positions in the order, the last one repeated
    positions = starts.unsqueeze(1) + torch.arange(width, device=bounds.device)
    free = positions >= stops.unsqueeze(1)
    source = torch.minimum(positions, stops.unsqueeze(1) - 1).sub_(present[0][1])
    taken = free.logical_not_().flatten().nonzero().squeeze(1)
    back = _inverse(rows, groups.ids.numel())
    return Slots(some, len(present), rows[source.flatten()], rows, taken, None if back is None else taken[back])


def _inverse(rows: Tensor, total: int) -> Tensor | None:
    """Where each row of the batch stands in `rows`, or None unless all are there."""
    return torch.argsort(rows) if rows.numel() == total else None
