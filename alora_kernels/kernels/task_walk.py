"""Walking the tasks of a block of rows inside a kernel.

In:   the task ids of a block's rows, a vector [BLOCK_M]; in any order.
Out:  the smallest task in the block, then the next one, until none is left.
Who:  `task_shrink`, `one_pass_task` and `linear_dx_task`.

A block of 64 or 128 rows meets one task, seldom two or three. Each step jumps to the next task that is present, so
absent tasks cost nothing however many there are. Rows of no task have ids that no step returns: -1, or E and above.

    task = next_task(ids, -1, E)
    while task < E:
        ...                                # rows with ids == task
        task = next_task(ids, task, E)
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def next_task(ids, previous, E):
    """The smallest id above `previous` in the block, or E if there is none."""
    return tl.min(tl.where((ids > previous) & (ids < E), ids, E), axis=0)
