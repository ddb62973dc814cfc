"""Walking the tasks of a block of rows inside a kernel.

In:   a block of positions of `RowGroups.order`, where the rows of one task are neighbours.
Out:  the first position that belongs to a task and that task; then the same again from where it ends.
Who:  `task_shrink` and `linear_dx_task`.

A block of 64 or 128 rows meets one task, seldom two or three. Each step jumps to the next task that is
present, so absent tasks cost nothing however many there are. The walk looks like this:

    pos, task = first_segment(start, M, E, ids_ptr, order_ptr, offsets_ptr)
    while (pos < end) & (task < E):
        stop = tl.minimum(end, tl.load(offsets_ptr + task + 1))   # rows pos .. stop belong to task
        pos = stop
        task = task_at(pos, M, E, ids_ptr, order_ptr)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def task_at(pos, M, E, ids_ptr, order_ptr):
    """The task of position `pos` of the order, or E past the end."""
    row = tl.load(order_ptr + pos, mask=pos < M, other=0)
    return tl.load(ids_ptr + row, mask=pos < M, other=E)


@triton.jit
def first_segment(start, M, E, ids_ptr, order_ptr, offsets_ptr):
    """The first position at or after `start` that belongs to a task, and the task."""
    pos = tl.maximum(start, tl.load(offsets_ptr))  # rows with id -1 come before offsets[0]
    return pos, task_at(pos, M, E, ids_ptr, order_ptr)
