"""`FusedALoRALinear`: the drop-in replacement for `nn.Linear` in training code that nobody prepared.

The base weight and bias are frozen parameters named as in `nn.Linear`, so a plain state dict loads into the layer with
`strict=False`. The ids of the batch are given to `forward`, or read from `with alora_kernels.route(ids): ...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import trusted_alora
from ..ops.checks import check_whole
from ..ops.dispatch import prepare
from ..routing import Routing, current_routing
from .adapter import AdaptedLinear, delta_weight, reset_adapter_, task_id, task_ids_from_names, task_names


class FusedALoRALinear(AdaptedLinear):
    """A frozen linear layer with several low-rank A and one shared B.

    Formula: `y = x W0^T + bias + s (sum_e g_e(x) A_e dropout(x)) B^T`, s = lora_alpha / r.

    Args:
        in_features, out_features: K and N.
        r: rank R >= 1.
        tasks: task routing: a count or a list of names; the ids of a batch pick A_e.
        num_experts: soft routing: E experts weighted per token by a learned softmax router.
        lora_alpha: numerator of the scaling s; defaults to 2 r.
        use_rslora: s = lora_alpha / sqrt(r).
        lora_dropout: dropout on the input of the low-rank path, in training mode.
        bias: whether the base has a bias.
        device, dtype: of all parameters.

    Attributes:
        weight, bias: the frozen base.
        lora_A: `[E, R, K]`.
        lora_B: `[N, R]`.
        router: `[E, K]`, or None for task routing.
        tasks: task names; empty for soft routing.
        merged_task: the task folded into the weight, or None.

    Raises:
        ValueError: both or neither of tasks and num_experts, r < 1, repeated task names.

    Source: Ban & Ji 2025, ALoRA.
    """

    ids_by = "pass task_ids to forward, or call the model inside"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        *,
        tasks: int | Sequence[str] | None = None,
        num_experts: int | None = None,
        lora_alpha: float | None = None,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (tasks is None) == (num_experts is None):
            raise ValueError("give exactly one of tasks (task routing) and num_experts (soft routing)")
        if r < 1 or (num_experts is not None and num_experts < 1):
            raise ValueError(f"r and num_experts must be at least 1, got r={r}, num_experts={num_experts}")
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__(linear, r, lora_alpha=lora_alpha, use_rslora=use_rslora, lora_dropout=lora_dropout)
        self.tasks = () if tasks is None else task_names(tasks)
        self.num_experts = num_experts if num_experts is not None else len(self.tasks)
        self.merged_task: str | None = None
        self._add_adapter()

    def _add_adapter(self) -> None:
        self.lora_A = self._empty(self.num_experts, self.r, self.in_features)
        self.lora_B = self._empty(self.out_features, self.r)
        self.router = None if self.tasks else self._empty(self.num_experts, self.in_features)
        reset_adapter_(self.lora_A, self.lora_B, self.router)
        prepare(self.lora_A.device)

    def reset_parameters(self) -> None:
        """Draw the base as `nn.Linear` does and the adapter as `reset_adapter_` does."""
        nn.Linear.reset_parameters(cast(nn.Linear, self))
        reset_adapter_(self.lora_A, self.lora_B, self.router)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, **options: Any) -> FusedALoRALinear:
        """Wrap an `nn.Linear`; its weight and bias are shared, not copied, and frozen.

        `options` are the class's tasks, num_experts, lora_alpha, use_rslora and lora_dropout. A TypeError for another
        layer, whose weight is no plain matrix: use `alora_kernels.alora_delta` on its output. A ValueError for one that
        is split over processes.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"from_linear takes an nn.Linear, got {type(linear).__name__}: for other layers add"
                " alora_kernels.alora_delta to their output, or use the PEFT tuner"
            )
        check_whole(linear._parameters)
        like: dict[str, Any] = {"bias": linear.bias is not None, "dtype": linear.weight.dtype, "device": "meta"}
        new = cls(linear.in_features, linear.out_features, r, **like, **options)
        new._stand_beside(linear)
        new._add_adapter()
        return new.train(linear.training)

    def forward(self, x: Tensor, task_ids: Tensor | Sequence[str | int] | Routing | None = None) -> Tensor:
        """y `[..., N]` from x `[..., K]`.

        Task routing takes integer ids `[batch]` or `x.shape[:-1]`, a list of task names, or a `Routing`; -1 or
        "__base__" means the base alone, None reads the routing context. A ValueError for no ids, ids that do not fit,
        or ids given to a soft-routed or a merged layer.
        """
        if self.merged_task is not None:
            if task_ids is not None or current_routing() is not None:
                raise ValueError(f"task {self.merged_task!r} is merged into the weight: call unmerge() before routing")
            return F.linear(x, self.weight, self.bias)
        if not self.enabled:
            return F.linear(x, self.weight, self.bias)
        if self.router is not None and task_ids is not None:
            raise ValueError("this layer routes by its learned router (num_experts): it takes no task_ids")
        return trusted_alora(
            x,
            self.lora_A,
            self.lora_B,
            weight=self.weight,
            bias=self.bias,
            router=self.router,
            task_ids=None if self.router is not None else self._given(task_ids, x.device),
            scaling=self.scaling,
            dropout_p=self.lora_dropout,
            training=self.training,
        )

    def _given(self, task_ids: Any, device: torch.device) -> Tensor | Routing:
        """The ids of this call: the argument, else those of `_routing`."""
        if task_ids is None:
            return self._routing()
        if isinstance(task_ids, Routing):
            return task_ids.at(self, self.rows)
        return task_ids if isinstance(task_ids, Tensor) else task_ids_from_names(task_ids, self.tasks).to(device)

    @torch.no_grad()
    def _delta_weight(self, task: str) -> Tensor:
        """s B A_task, `[N, K]`, computed in float32 or wider."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        a = self.lora_A[task_id(task, self.tasks)]
        return delta_weight(a, self.lora_B, self.scaling, wide).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self, task: str | int) -> None:
        """Fold one task, by name or id, into the weight: `W0 + s B A_task`; the layer then serves that task alone.

        A ValueError for an unknown task, soft routing (the gate differs per token), or a layer that is merged already.
        """
        if self.router is not None:
            raise ValueError("soft routing weighs the experts per token, so no single weight equals it: cannot merge")
        if self.merged_task is not None:
            raise ValueError(f"task {self.merged_task!r} is merged already: call unmerge() first")
        index = task_id(task, self.tasks)
        if index < 0:
            raise ValueError("the base has nothing to merge")
        self.weight.add_(self._delta_weight(self.tasks[index]))
        self.merged_task = self.tasks[index]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the merged task out of the weight again (to rounding); without a merge, do nothing."""
        if self.merged_task is not None:
            self.weight.sub_(self._delta_weight(self.merged_task))
            self.merged_task = None

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As any module; refused while merged, because the file would count the task twice when loaded."""
        if self.merged_task is not None:
            raise RuntimeError(f"task {self.merged_task!r} is merged into the weight: call unmerge() before saving")
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another, and what is merged."""
        routed = f"tasks={list(self.tasks)}" if self.tasks else f"num_experts={self.num_experts}"
        merged = "" if self.merged_task is None else f", merged_task={self.merged_task!r}"
        return self._arguments(f"{routed}, ") + merged
