"""What every adapter is made of: task names and ids, how A, B and a router start, s, and the layer they stand beside.

The PEFT tuner and the trainer use it; `FusedALoRALinear` and the layers of the baselines are `AdaptedLinear`s.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.checks import check_whole
from ..recompute import replayed_state
from ..routing import ConstantRouting, Layout, Routing, current_routing

BASE = "__base__"


def task_names(tasks: int | Sequence[str]) -> tuple[str, ...]:
    """Unique task names; a count n gives "0" .. "n - 1".

    A TypeError if a name is no string; a ValueError for no task, a repeated name, or the reserved "__base__".
    """
    if isinstance(tasks, str):
        raise TypeError(f"tasks must be a list of names or a count, got the string {tasks!r}: use [{tasks!r}]")
    names = tuple(str(i) for i in range(tasks)) if isinstance(tasks, int) else tuple(tasks)
    if not names:
        raise ValueError("an ALoRA layer needs at least one task")
    if any(not isinstance(name, str) for name in names):
        raise TypeError(f"task names must be strings, got {names}")
    if len(set(names)) != len(names) or BASE in names:
        raise ValueError(f"task names must be unique and not {BASE!r} (reserved for the base model), got {names}")
    return names


def task_id(task: Any, tasks: Sequence[str]) -> int:
    """The id of one task, by name or id (also a NumPy or torch number), or a ValueError; "__base__" and -1 give -1."""
    task = plain_task(task)
    if isinstance(task, str) and (task == BASE or task in tasks):
        return -1 if task == BASE else list(tasks).index(task)
    if isinstance(task, int) and not isinstance(task, bool) and -1 <= task < len(tasks):
        return task
    raise ValueError(f"unknown task {task!r}: valid tasks are {', '.join(tasks)} and {BASE} (the base model alone)")


def plain_task(task: Any) -> Any:
    """A task as a Python string or integer, so that equal tasks are equal keys; other values are left as they are."""
    if getattr(task, "ndim", None) == 0:  # NumPy scalars, and arrays and tensors of one number
        task = task.item()
    return int(task) if isinstance(task, Integral) and not isinstance(task, bool) else task


def task_ids_from_names(names: Sequence[Any], tasks: Sequence[str]) -> Tensor:
    """Ids `[len(names)]` of the tasks named, int64 on the CPU; an unknown task is a ValueError."""
    return torch.tensor([task_id(name, tasks) for name in names], dtype=torch.long)


@torch.no_grad()
def reset_adapter_(lora_A: Tensor, lora_B: Tensor, router: Tensor | None = None) -> None:
    """Kaiming-uniform A_e and router (a = sqrt 5, as PEFT's LoRA and `nn.Linear`), zero B: it begins as its base.

    lora_A is `[E, R, K]`, with further dimensions before R where there are several A per task; lora_B `[N, R]`, router
    `[E, K]` or None. Each A_e is drawn on its own: identical A would
    make experts symmetric, with equal gradients, and they would never part (and the similarity of A across tasks that
    Ban & Ji 2025 trace back to a shared initialisation would be built in).
    """
    for a in lora_A.flatten(0, -3):
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(lora_B)
    if router is not None:
        nn.init.kaiming_uniform_(router, a=math.sqrt(5))


def seeded_a(task: str, module: str, shape: Sequence[int], seed: int) -> Tensor:
    """A `[R, K]`, or one per expert `[X, R, K]`, in float32 of a task that joins others.

    Drawn as `reset_adapter_` does. One task, module and seed give the same numbers, be the adapter saved or live.
    """
    digest = hashlib.sha256(f"{seed}\0{task}\0{module}".encode()).digest()
    numbers = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    drawn = torch.empty(*shape)
    for a in drawn.view(-1, *shape[-2:]):
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=numbers)
    return drawn


def lora_scaling(lora_alpha: float, r: int, use_rslora: bool) -> float:
    """s = lora_alpha / r, or lora_alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def delta_weight(a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s B A, `[N, K]`: what one task changes of the weight, from its A `[R, K]` and B `[N, R]`, computed in a dtype."""
    return scaling * (b.to(dtype) @ a.to(dtype))


class AdaptedLinear(nn.Module):
    """A frozen layer and what a subclass adds: `y = x W0^T + bias + delta(x)`, in plain torch under autograd.

    `FusedALoRALinear` is one, with a forward of its own; ALoRA's neighbours in the literature (`baselines`) are others:
    to train them on the same data and compare, not to be the fastest. Weight and bias keep their names; they are shared
    with the plain `nn.Linear` that is replaced, not copied, and frozen. Other arguments as in `FusedALoRALinear`.
    """

    tasks: tuple[str, ...] = ()  # empty where ids of the batch do not matter
    rows_name: str | None = None  # the layer's name in the model, if somebody told it
    rows: Layout | None = None  # where the batch rows are in what the layer is given; None if nobody knows
    ids_by = "call the model inside"  # how ids are given, for errors

    def __init__(
        self,
        linear: nn.Linear,
        r: int,
        *,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if type(linear) is not nn.Linear:
            raise TypeError(f"{type(self).__name__} replaces an nn.Linear, got {type(linear).__name__}")
        check_whole(linear._parameters)
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r must be a whole number >= 1, got {r!r}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
        self.in_features, self.out_features, self.r = linear.in_features, linear.out_features, r
        self.lora_alpha = float(2 * r if lora_alpha is None else lora_alpha)
        self.use_rslora, self.lora_dropout = use_rslora, float(lora_dropout)
        self.scaling = lora_scaling(self.lora_alpha, r, use_rslora)
        self._stand_beside(linear)
        self.enabled = True  # False leaves the base alone
        self.train(linear.training)

    def _stand_beside(self, linear: nn.Linear) -> None:
        """Share the weights of a layer, and freeze them."""
        linear.requires_grad_(False)
        self.weight, self.bias = cast(nn.Parameter, linear.weight), linear.bias

    def _empty(self, *shape: int) -> nn.Parameter:
        """A parameter of the base's dtype where the base is."""
        return nn.Parameter(torch.empty(*shape, dtype=self.weight.dtype, device=self.weight.device))

    def _routing(self) -> Routing:
        """The ids of this call, from the routing context; without one all rows are of the only task, if it is one."""
        routing: Routing | None = replayed_state(self, current_routing, routed=len(self.tasks) > 1)
        if routing is not None:
            return routing.at(self, self.rows)
        if len(self.tasks) == 1:
            return ConstantRouting(0)
        raise ValueError(
            f"this layer has the tasks {', '.join(self.tasks)}: {self.ids_by} `with alora_kernels.route(ids): ...`"
        )

    def _added(self, y: Tensor, x: Tensor, dropped: Tensor, leading: torch.Size) -> Tensor:
        """The base output y `[M, N]` plus the low-rank part of x `[M, K]`; the leading shape x had in the call."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """y `[..., N]` from x `[..., K]`; adapters wider than x are rounded to its dtype."""
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, self.weight, self.bias)
        if self.enabled:
            y = self._added(y, rows, F.dropout(rows, self.lora_dropout, self.training), x.shape[:-1])
        return y.view(*x.shape[:-1], self.out_features)

    def _arguments(self, routed: str = "") -> str:
        """What tells one layer from another; `routed` is what a subclass says of its routing."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, {routed}"
        text += f"lora_alpha={self.lora_alpha:g}, bias={self.bias is not None}"
        text += f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return text + (", use_rslora=True" if self.use_rslora else "")

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return self._arguments()
