"""Which rows belong to which task: built once per batch, shared by every layer.

From task ids as the user has them (one per batch row or per token, -1 for the base model alone) to `RowGroups`, as
kernels want them. Layers read the ids of the running batch from the context, `with route(ids): model(x)`; a `Routing`
remembers the groups it built, so a model of 200 layers sorts its ids once. Beams and packed rows are expanded here
(`expand_ids`), nowhere else; what does not fit is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class RowGroups(NamedTuple):
    """Rows grouped by task.

    The rows of task t are `order[offsets[t]:offsets[t + 1]]`; rows that belong to no task (id -1) are
    `order[:offsets[0]]`. Within a group rows keep their order, so equal ids give equal groups.
    """

    ids: Tensor  # task of each row `[M]`, int32
    order: Tensor  # row numbers sorted by task `[M]`, int32
    offsets: Tensor  # where each task's rows begin in `order`, `[E + 1]`, int32


def group_rows(ids: Tensor, num_tasks: int) -> RowGroups:
    """Group rows by task with one stable sort, on the ids' device and without a transfer to the host.

    `ids` is the task of each row `[M]`, of any integer dtype, -1 .. num_tasks - 1.
    """
    ids = ids.to(torch.int32)
    by_task, order = torch.sort(ids, stable=True)
    bounds = torch.arange(num_tasks + 1, dtype=torch.int32, device=ids.device)
    offsets = torch.searchsorted(by_task, bounds, out_int32=True)
    return RowGroups(ids.contiguous(), order.to(torch.int32), offsets)


def capturing(device: torch.device) -> bool:
    """Whether what runs on the device now is put into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_ids(task_ids: Tensor, num_tasks: int) -> None:
    """Raise a TypeError unless ids are integers, a ValueError unless each names a task or is -1.

    Reads the smallest and largest id back to the host, so it is skipped while a CUDA graph is being captured; a row
    whose id names no task then gets the base output alone. A traced graph asks at every run, a RuntimeError.
    """
    if task_ids.is_floating_point() or task_ids.is_complex() or task_ids.dtype == torch.bool:
        raise TypeError(f"task_ids must be integers, got {task_ids.dtype}; use task_ids.long()")
    if torch.compiler.is_compiling():  # asked by the graph itself; on a GPU a device-side assertion
        known = ((task_ids >= -1) & (task_ids < num_tasks)).all()
        torch._assert_async(known, f"a task id is out of range: valid ids are -1 (base only) and 0 .. {num_tasks - 1}")
        return
    if task_ids.numel() == 0 or task_ids.device.type == "meta":
        return
    if capturing(task_ids.device):
        return
    low, high = (int(v) for v in torch.aminmax(task_ids))
    if low < -1 or high >= num_tasks:
        bad = low if low < -1 else high
        raise ValueError(f"task id {bad} is out of range: valid ids are -1 (base only) and 0 .. {num_tasks - 1}")


Layout = Literal["batch", "blocks", "time", "steps", "mixed"]


class Routing:
    """The task ids of one batch, and the row groups already built from them.

    Args:
        task_ids: integer ids, one per batch row `[B]` or one per token `[B, T]` (packed: `[M]` or `[1, M]`); -1 means
            the base alone.
        repeats: how many consecutive rows of the model's batch may share an id, such as the beams of `generate`.

    Raises:
        TypeError: the ids are not an integer tensor.
        ValueError: repeats < 1.
    """

    given_as = "task_ids"
    layer: object = None  # that asks, and where the rows are in what it is given; see `at`
    layout: Layout | None = None
    _shared: list[Any] | None = None  # see `in_graph`
    kept: tuple[str, ...] = ("task_ids", "repeats", "one_row", "layer", "layout", "_shared")  # by a copy in a graph

    def __init__(self, task_ids: Tensor, repeats: int = 1) -> None:
        if not isinstance(task_ids, Tensor):
            raise TypeError(f"task_ids must be an integer tensor, got {type(task_ids).__name__}")
        if repeats < 1:
            raise ValueError(f"repeats is how many rows share an id: at least 1, got {repeats}")
        self.task_ids, self.repeats = task_ids, repeats
        self.one_row = False  # known to be a batch of one row: wherever its rows are, they are of its task
        self._groups: dict[tuple[torch.Size, int, torch.device, Layout | None, bool], RowGroups] = {}
        self._checked: set[int] = set()

    def groups(self, leading: torch.Size, num_tasks: int, device: torch.device) -> RowGroups:
        """Row groups for activations `[*leading, K]` and E tasks, made at first request; ValueError for a misfit."""
        if torch.compiler.is_compiling():
            return self._groups_in_graph(leading, num_tasks, device)
        key = (leading, num_tasks, device, self.layout, capturing(device))  # a replayed graph makes its own anew
        if key not in self._groups:
            if num_tasks not in self._checked:
                check_ids(self.task_ids, num_tasks)
                self._checked.add(num_tasks)
            self._groups[key] = self._made(leading, num_tasks, device)
        return self._groups[key]

    def _made(self, leading: torch.Size, num_tasks: int, device: torch.device) -> RowGroups:
        ids = expand_ids(self.task_ids, leading, self.repeats, self.layout)
        if ids is None and (self.one_row or (num_tasks == 1 and _all_equal(self.task_ids))):
            ids = self.task_ids.reshape(-1)[:1].expand(leading.numel())  # no row can be taken for another
        if ids is None:
            raise ValueError(_misfit(self.task_ids, leading, self.repeats, self.layout, self.layer))
        return group_rows(ids.to(device), num_tasks)

    def _groups_in_graph(self, leading: torch.Size, num_tasks: int, device: torch.device) -> RowGroups:
        """As `groups` while a compiler traces; sizes that it does not know are no keys of a dict."""
        for made_for, count, where, layout, groups in self._shared or ():
            if made_for == leading and count == num_tasks and where == device and layout == self.layout:
                return groups  # type: ignore[no-any-return]
        check_ids(self.task_ids, num_tasks)
        groups = self._made(leading, num_tasks, device)
        if self._shared is not None:
            self._shared.append((leading, num_tasks, device, self.layout, groups))
        return groups

    def in_graph(self) -> Routing:
        """The same ids for one call of a model that a compiler traces: one sort in the graph, not one per layer."""
        return self._with(_shared=[])

    def for_tasks(self, tasks: tuple[str, ...]) -> Routing:
        """The ids as an adapter with these tasks counts them: the same for all, unless they were given as names."""
        return self

    def at(self, layer: object, layout: Layout | None = None) -> Routing:
        """The same ids for one layer, which errors name; what was built for one layer serves all of its layout.

        `layer` has a `rows_name`, or is named by its repr; for `layout`, None where nobody knows it, see `expand_ids`.
        """
        return self._with(layer=layer, layout=layout)

    def _with(self, **changes: Any) -> Routing:
        """A copy, in a tenth of the time of `copy.copy`: each layer asks for one."""
        other = object.__new__(type(self))
        if torch.compiler.is_compiling():  # a graph that reads what calls have left here is for those calls alone
            for name in self.kept:  # torch 2.11 cannot trace `__dict__`
                setattr(other, name, changes[name] if name in changes else getattr(self, name))
            other._groups, other._checked = {}, set()
        else:
            other.__dict__.update(self.__dict__, **changes)
        return other

    def repeated(self, repeats: int) -> Routing:
        """The same ids for a model that may repeat each batch row for so many consecutive rows."""
        return self._with(repeats=repeats, _groups={})

    def check_batch(self, rows: int, tokens: int | None) -> None:
        """Raise a ValueError, with the remedy, unless a model's batch has one id per row or (None: unknown) token."""
        ids = self.task_ids
        if ids.numel() == tokens or (ids.dim() == 1 and _repeated(rows, ids.numel(), self.repeats)):
            self.one_row = ids.numel() == 1
            return
        beams = ids.dim() == 1 and ids.numel() > 0 and rows % ids.numel() == 0
        raise ValueError(
            f"{self.given_as} has {ids.numel()} entries of shape {tuple(ids.shape)} but the batch has {rows} rows"
            + ("" if tokens is None else f" and {tokens} tokens")
            + ": give one per row, or a tensor with one id per token"
            + (f"; if each row stands for {rows // ids.numel()} beams: route(ids, repeats=...)" if beams else "")
        )


class ConstantRouting(Routing):
    """One task for every row: its groups need no sort, which a compiled graph would hold once per layer."""

    kept = (*Routing.kept, "task")

    def __init__(self, task: int) -> None:
        super().__init__(torch.tensor([task]))
        self.task = task

    def groups(self, leading: torch.Size, num_tasks: int, device: torch.device) -> RowGroups:
        """As `Routing.groups`; rows of any layout fit."""
        if torch.compiler.is_compiling():
            return self._made(leading, num_tasks, device)
        key = (leading, num_tasks, device, None, False)
        if key not in self._groups:
            self._groups[key] = self._made(leading, num_tasks, device)
        return self._groups[key]

    def _made(self, leading: torch.Size, num_tasks: int, device: torch.device) -> RowGroups:
        rows = leading.numel()
        ids = torch.full((rows,), self.task, dtype=torch.int32, device=device)
        order = torch.arange(rows, dtype=torch.int32, device=device)
        after = torch.arange(num_tasks + 1, dtype=torch.int32, device=device) > self.task
        return RowGroups(ids, order, (after * rows).to(torch.int32))

    def check_batch(self, rows: int, tokens: int | None) -> None:
        """Nothing to check: the task is that of every row."""


class PickedRouting(Routing):
    """The ids of some rows `[P]` of activations `[B, T, ...]`, for a layer that is given these rows alone."""

    kept = (*Routing.kept, "_whole", "_leading", "_rows")

    def __init__(self, whole: Routing, leading: torch.Size, rows: Tensor) -> None:
        ids = whole.task_ids
        each = ids.expand(leading.numel()) if ids.numel() == 1 else expand_ids(ids, leading, whole.repeats, "batch")
        if each is None:
            raise ValueError(_misfit(ids, leading, whole.repeats, "batch", None))
        super().__init__(each[rows.to(each.device)])
        self._whole, self._leading, self._rows, self._checked = whole, leading, rows, whole._checked

    def for_tasks(self, tasks: tuple[str, ...]) -> Routing:
        """As `Routing.for_tasks`, of the rows."""
        whole = self._whole.for_tasks(tasks)
        return self if whole is self._whole else PickedRouting(whole, self._leading, self._rows)


@lru_cache(maxsize=4)  # prefill and decoding shapes; each entry is 8 bytes per token
def _cached(task: int, leading: torch.Size, device: torch.device, inference: bool) -> Routing:
    return ConstantRouting(task)


def constant_routing(task: int, leading: torch.Size, device: torch.device) -> Routing:
    """The same task for every row, remembered so that a model of 200 layers makes its groups once.

    Tensors made while tracing, capturing or in inference mode are not handed to calls outside of it.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or capturing(device):
        return ConstantRouting(task)
    return _cached(task, leading, device, torch.is_inference_mode_enabled())


def expand_ids(task_ids: Tensor, leading: torch.Size, repeats: int = 1, layout: Layout | None = None) -> Tensor | None:
    """One id per row of the activations `[*leading, K]` as they are flattened, `[M]`; None if the ids do not fit.

    Which dimension is the batch cannot be read from a shape: a layer that knows says so. Ids per batch row, B of them,
    fit the layouts below; where nothing is known, only the first. Each id counts for `repeats` consecutive rows if the
    batch has B * repeats, the way `generate` expands its inputs.

    - "batch": `[B, ...]`.
    - "blocks": as many consecutive rows for each batch row: windows `[n B, ...]`, flattened tokens `[B T]`.
    - "time": `[T, B, ...]`.
    - "steps": all rows of one time step after those of the step before, `[T B]`.
    - "mixed": no ids fit; the data decide.
    """
    if layout == "mixed":
        return None
    ids = _per_token(task_ids, leading, layout)
    return ids if ids is not None else _per_row(task_ids, leading, repeats, layout)


def _per_token(task_ids: Tensor, leading: torch.Size, layout: Layout | None) -> Tensor | None:
    """Ids per token, if the activations have one row for each."""
    if task_ids.numel() != leading.numel():
        return None
    if layout in ("time", "steps"):
        if task_ids.dim() != 2 or task_ids.shape[0] == task_ids.shape[1]:
            return None  # as many rows as tokens: which are which?
        turned = task_ids.t()
        if layout == "steps" or turned.shape == leading[:2]:
            return turned.reshape(-1)
        return task_ids.reshape(-1) if task_ids.shape == leading else None
    fits = task_ids.shape == leading or leading[:1] == (1,)  # packed
    fits = fits or (task_ids.dim() != 1 and (len(leading) == 1 or leading[0] == task_ids.shape[0]))
    return task_ids.reshape(-1) if fits else None


def _per_row(task_ids: Tensor, leading: torch.Size, repeats: int, layout: Layout | None) -> Tensor | None:
    """Ids per batch row, if these rows can be told apart in the leading shape."""
    batch, rows = task_ids.numel(), leading.numel()
    if task_ids.dim() != 1 or len(leading) == 0:
        return None
    if batch == 0:
        return task_ids if rows == 0 else None
    if layout == "time":
        columns = leading[1] if len(leading) > 1 else 0
        if not _repeated(columns, batch, repeats):
            return None
        inside = leading[2:].numel()
        return task_ids.repeat_interleave(columns // batch * inside).repeat(leading[0])
    if layout == "steps":
        return task_ids.repeat(rows // batch) if rows % batch == 0 and repeats == 1 else None
    if layout == "blocks":
        fits = rows % batch == 0 and (leading[0] % batch == 0 or leading[0] == 1)
    else:
        fits = _repeated(leading[0], batch, repeats)
    return task_ids.repeat_interleave(rows // batch) if fits else None


def _repeated(rows: int, ids: int, repeats: int) -> bool:
    """Whether so many rows are those of the ids: one for each, or a divisor of the repeats, as an encoder has."""
    return rows == ids or (ids > 0 and rows > 0 and rows % ids == 0 and repeats % (rows // ids) == 0)


def _all_equal(task_ids: Tensor) -> bool:
    if torch.compiler.is_compiling() or task_ids.numel() == 0:
        return False
    return bool((task_ids == task_ids.reshape(-1)[0]).all())


def _misfit(task_ids: Tensor, leading: torch.Size, repeats: int, layout: Layout | None, layer: object) -> str:
    name = getattr(layer, "rows_name", None) or ("this layer" if layer is None else repr(layer))
    known = "" if layout is None else f", known to be laid out as {layout!r}"
    beams = f" (each for up to {repeats} rows)" if repeats > 1 else ""
    return (
        f"{name}: task_ids of shape {tuple(task_ids.shape)}{beams} fit neither the batch nor the tokens of activations"
        f" with leading shape {tuple(leading)}{known}. With one id per batch row the first dimension must be the batch."
        " Give one id per token, `route(ids[:, None].expand(B, T))`; say `route(ids, repeats=n)` if the batch holds n"
        " consecutive rows for each id; or leave the layer out (exclude_modules)"
    )


class _Traced(threading.local):
    """The innermost routing of a thread: what compiled code reads, for `torch.compile` can follow no context.

    Its ids are an input of the graph, so new ones do not compile again.
    """

    def __init__(self) -> None:
        self.routing: Routing | None = None


_current: ContextVar[Routing | None] = ContextVar("alora_routing", default=None)
_traced = _Traced()


@contextmanager
def route(task_ids: Tensor | Sequence[int] | Routing, repeats: int = 1) -> Iterator[Routing]:
    """Set the task ids of the batch for every ALoRA layer called inside the block.

    Blocks nest; leaving one, also by an exception, restores what was set before. Compiled models read the ids of their
    thread: a coroutine that calls one must not wait for another inside the block.

    Args:
        task_ids: ids per batch row or per token; -1 means the base alone.
        repeats: how many consecutive rows of the model's batch may share an id: the beams or returned sequences, where
            `generate` is not called on the model that `get_peft_model` returned.

    Raises:
        TypeError: the ids are not integers.
        ValueError: repeats < 1.

    Example:
        >>> with alora_kernels.route(torch.tensor([0, 2, -1])):
        ...     model(x)
    """
    if not isinstance(task_ids, Routing):
        if not isinstance(task_ids, Tensor):
            if any(isinstance(task, str) for task in task_ids):
                raise TypeError(
                    f"route takes ids, got {list(task_ids)!r}: names belong to an adapter or a layer, so give"
                    " adapter_names=[...] to a PEFT model, a list of names to the layer itself, or"
                    " [tasks.index(name) for name in ...] here"
                )
            task_ids = torch.tensor(task_ids)
        task_ids = Routing(task_ids, repeats)
    elif repeats != 1:
        task_ids = task_ids.repeated(repeats)
    token = None if torch.compiler.is_compiling() else _current.set(task_ids)
    outer, _traced.routing = _traced.routing, task_ids
    try:
        yield task_ids
    finally:
        _traced.routing = outer
        if token is not None:
            _current.reset(token)


def current_routing() -> Routing | None:
    """The routing of the innermost `route` block, or None outside of one."""
    return _traced.routing if torch.compiler.is_compiling() else _current.get()


def in_this_context(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function in a context that was entered by other means than `route`: compiled code reads its routing."""
    outer, _traced.routing = _traced.routing, _current.get()
    try:
        return function(*args, **kwargs)
    finally:
        _traced.routing = outer
