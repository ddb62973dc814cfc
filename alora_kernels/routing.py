"""Which rows belong to which task: built once per batch, shared by every layer.

In:   task ids as the user has them (one per batch row, or one per token; -1 = base model only).
Out:  `RowGroups`, the same ids as kernels want them: for each task the list of its rows.
Who:  `ops` turn ids into groups; modules and integrations read the ids of the running batch from the
      routing context, `with route(ids): model(x)`.

A `Routing` remembers the groups it built, so a model of 200 layers sorts its ids once. A module never
changes the ids: beams and packed rows are expanded here (`Routing.groups`), nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class RowGroups(NamedTuple):
    """Rows grouped by task.

    The rows of task t are `order[offsets[t]:offsets[t + 1]]`; rows that belong to no task (id -1) are
    `order[:offsets[0]]`. Within a group rows keep their order, so equal ids give equal groups.

    Attributes:
        ids: task of each row `[M]`, int32.
        order: row numbers sorted by task `[M]`, int32.
        offsets: where each task's rows begin in `order`, `[E + 1]`, int32.
    """

    ids: Tensor
    order: Tensor
    offsets: Tensor


def group_rows(ids: Tensor, num_tasks: int) -> RowGroups:
    """Group rows by task with one stable sort.

    Args:
        ids: task of each row `[M]`, any integer dtype, values -1 .. num_tasks - 1.
        num_tasks: E.

    Returns:
        The groups, on the ids' device, without a transfer to the host.
    """
    ids = ids.to(torch.int32)
    by_task, order = torch.sort(ids, stable=True)
    bounds = torch.arange(num_tasks + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(by_task, bounds, out_int32=True)
    return RowGroups(ids.contiguous(), order.to(torch.int32), offsets)


def check_ids(task_ids: Tensor, num_tasks: int) -> None:
    """Raise unless every id names a task or is -1.

    Reads the smallest and largest id back to the host, so it is skipped while a graph is being traced or
    captured; a row whose id names no task then gets the base output alone.

    Raises:
        TypeError: the ids are not integers.
        ValueError: an id is below -1 or not below num_tasks.
    """
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise TypeError(f"task_ids must be integers, got {task_ids.dtype}; use task_ids.long()")
    if torch.compiler.is_compiling() or task_ids.numel() == 0 or task_ids.device.type == "meta":
        return
    if task_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(v) for v in torch.aminmax(task_ids))
    if low < -1 or high >= num_tasks:
        bad = low if low < -1 else high
        raise ValueError(f"task id {bad} is out of range: valid ids are -1 (base only) and 0 .. {num_tasks - 1}")


class Routing:
    """The task ids of one batch, and the row groups already built from them.

    Args:
        task_ids: integer ids, one per batch row `[B]` or one per token (any shape whose number of
            elements is the number of tokens); -1 means the base alone.

    Raises:
        TypeError: the ids are not an integer tensor.
    """

    def __init__(self, task_ids: Tensor) -> None:
        if not isinstance(task_ids, Tensor):
            raise TypeError(f"task_ids must be an integer tensor, got {type(task_ids).__name__}")
        self.task_ids = task_ids
        self._groups: dict[tuple[torch.Size, int, torch.device], RowGroups] = {}
        self._checked: set[int] = set()

    def groups(self, leading: torch.Size, num_tasks: int, device: torch.device) -> RowGroups:
        """Row groups for activations of shape `[*leading, K]`, built at the first request.

        Args:
            leading: the activations' shape without the last dimension.
            num_tasks: E.
            device: where the groups are needed; the ids move there once.

        Raises:
            ValueError: an id is out of range, or the ids fit neither the batch nor the tokens.
        """
        key = (leading, num_tasks, device)
        if key not in self._groups:
            if num_tasks not in self._checked:
                check_ids(self.task_ids, num_tasks)
                self._checked.add(num_tasks)
            self._groups[key] = group_rows(expand_ids(self.task_ids, leading).to(device), num_tasks)
        return self._groups[key]


class ConstantRouting(Routing):
    """One task for every row: its groups need no sort, which a compiled graph would hold once per layer.

    Args:
        task: the task; -1 means the base alone.
    """

    def __init__(self, task: int) -> None:
        super().__init__(torch.tensor([task]))
        self.task = task

    def groups(self, leading: torch.Size, num_tasks: int, device: torch.device) -> RowGroups:
        """As `Routing.groups`."""
        key = (leading, num_tasks, device)
        if key not in self._groups:
            rows = leading.numel()
            ids = torch.full((rows,), self.task, dtype=torch.int32, device=device)
            order = torch.arange(rows, dtype=torch.int32, device=device)
            after = torch.arange(num_tasks + 1, dtype=torch.int32, device=device) > self.task
            self._groups[key] = RowGroups(ids, order, (after * rows).to(torch.int32))
        return self._groups[key]


def expand_ids(task_ids: Tensor, leading: torch.Size) -> Tensor:
    """One id per token, `[M]`, from ids per token, per batch row, or per group of consecutive batch rows.

    Ids of length B serve a batch of n * B rows (beams, `num_return_sequences`): each id is repeated for n
    consecutive rows, the way `generate` expands its inputs.

    Raises:
        ValueError: the number of ids divides neither the tokens nor the batch.
    """
    tokens = leading.numel()
    if task_ids.numel() == tokens:
        return task_ids.reshape(-1)
    batch = leading[0] if leading else 1
    if task_ids.dim() == 1 and task_ids.numel() > 0 and batch % task_ids.numel() == 0:
        return task_ids.repeat_interleave(tokens // task_ids.numel())
    raise ValueError(
        f"task_ids of shape {tuple(task_ids.shape)} fit neither the batch nor the tokens of activations with "
        f"leading shape {tuple(leading)}: give one id per batch row [{batch}] or one per token {tuple(leading)}"
    )


_current: ContextVar[Routing | None] = ContextVar("alora_routing", default=None)


@contextmanager
def route(task_ids: Tensor | Sequence[int] | Routing) -> Iterator[Routing]:
    """Set the task ids of the batch for every ALoRA layer called inside the block.

    Blocks nest; leaving one, also by an exception, restores what was set before.

    Args:
        task_ids: ids per batch row or per token; -1 means the base alone.

    Example:
        >>> with alora_kernels.route(torch.tensor([0, 2, -1])):
        ...     model(x)
    """
    if not isinstance(task_ids, Routing):
        task_ids = Routing(task_ids if isinstance(task_ids, Tensor) else torch.tensor(task_ids))
    token = _current.set(task_ids)
    try:
        yield task_ids
    finally:
        _current.reset(token)


def current_routing() -> Routing | None:
    """The routing of the innermost `route` block, or None outside of one."""
    return _current.get()
