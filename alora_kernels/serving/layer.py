"""An engine's layers: what depends on the batch alone is worked out once per step, not once per layer.

A step of few tokens is 200 layers of half a millisecond: to find the rows of each task, to check what cannot change
while an engine runs and to gather each task's A is a good part of that. A stays the same from step to step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import packed
from ..ops.autograd import needs_dispatch
from ..ops.dispatch import choose
from ..ops.products import add_product_
from ..ops.torch_backend import shrink_rows
from ..ops.torch_rows import NARROW, Layout, Slots, layout_of
from ..ops.types import wider
from ..routing import Routing, current_routing
from ..tuner.base_layer import takes_fused_op
from ..tuner.layer import ALoRALinear


class StepRows:
    """Which rows of a step meet which A: a layout of rows, and the slots whose A it takes, side by side.

    Args:
        slots: of the step's tokens.
        capacity: how many slots there are.
        x: what a layer is given, `[M, K]`.
        dtype: of the products with A.
    """

    def __init__(self, slots: Routing, capacity: int, x: Tensor, dtype: torch.dtype) -> None:
        groups = slots.groups(torch.Size([1, x.shape[0]]), capacity, x.device)
        layout = layout_of(groups, x.shape[1], dtype)
        self.layout: Layout = layout
        self.tasks: Tensor | None = None  # None where the layout takes A as it is
        self.key: tuple[int, ...] = ()
        if isinstance(layout, Slots) and layout.tasks is not None:
            self.tasks, self.key, self.layout = layout.tasks, tuple(layout.tasks.tolist()), layout._replace(tasks=None)
        self.count, self.some_base = x.shape[0], groups.offsets[0].item() > 0
        self.by_torch = choose(x, None) == "torch"


class StepRouting(Routing):
    """The slots of one step's tokens `[1, M]`; layers on a CPU ask for its rows, the first of them makes them."""

    _rows: dict[bool, StepRows] | None = None  # of narrow layers and of others, whose layouts may differ

    def rows(self, capacity: int, x: Tensor, dtype: torch.dtype) -> StepRows:
        """The rows of this step; x and dtype as in `StepRows`."""
        known = self._rows = {} if self._rows is None else self._rows
        narrow = x.shape[1] < NARROW
        if narrow not in known:
            known[narrow] = StepRows(self, capacity, x, dtype)
        return known[narrow]


class SlotLinear(ALoRALinear):
    """`ALoRALinear` as `Slots` fills it: nothing is merged, one adapter, no dropout, and A changes between steps alone.

    Same numbers, bit for bit. Calls outside of an engine's steps, and bases that are no plain linear layers, go the
    usual way.
    """

    _gathered: tuple[tuple[int, ...], int, Tensor] | None = None  # slots, version of A, their A's

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `ALoRALinear.forward`."""
        step = current_routing()
        if type(step) is not StepRouting or args or kwargs or not self._plain(x):
            return super().forward(x, *args, **kwargs)
        (name,) = self.asymlora_spec
        a, b = self.asymlora_A[name].weight, self.asymlora_B[name].weight
        flat = x.view(-1, x.shape[-1])
        rows = step.rows(a.shape[0], flat, wider(flat, a))
        if rows.count != flat.shape[0] or not rows.by_torch:
            return super().forward(x)
        base: Any = self.base_layer
        h = shrink_rows(flat, self._matrices(a, rows), rows.layout, self.asymlora_spec[name].scaling)
        multiply = F.linear if rows.some_base else packed.linear  # see `ops.torch_backend.base_product`
        y = add_product_(multiply(flat, base.weight, base.bias), h, b.t())
        return y.view(*x.shape[:-1], y.shape[1])

    def _plain(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and x.is_contiguous()
            and takes_fused_op(self.base_layer)
            and x.dtype == self.base_layer.weight.dtype
            and not torch.is_autocast_enabled("cpu")
            and not needs_dispatch(x)
        )

    def _matrices(self, a: Tensor, rows: StepRows) -> Tensor:
        """The A's that the layout asks for, kept for the next step."""
        if rows.tasks is None:
            return a
        kept = self._gathered
        if kept is None or kept[0] != rows.key or kept[1] != a._version:
            kept = self._gathered = rows.key, a._version, a.index_select(0, rows.tasks)
        return kept[2]
