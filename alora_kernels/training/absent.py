"""Tasks that a batch does not hold keep their A as it is: two hooks around the step of any torch optimiser.

All A of a layer are one tensor, so momentum would move an absent task along its old gradient and weight decay would
shrink it, more often the rarer the task. What stays shared is the optimiser's step count, one number per tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Trainer

from ..tuner.tasks import trained_part
from .tasks import stacked_a

NOT_FROZEN = (
    "tasks that train_only leaves out would be moved by weight decay and momentum: train in whole processes, with"
    " torch's optimisers and keep_absent_tasks=True"
)


class KeepAbsentTasks:
    """Restore the rows of absent tasks after each optimiser step, without a transfer to the host.

    State is kept where it can be told apart by task: moments of the parameter's shape or several of them in one tensor
    (AdEMAMix), factored moments (Adafactor), and 8-bit moments whose blocks do not reach across tasks (r * in_features
    a multiple of the block, 256 in bitsandbytes). Other state makes one warning that names it.

    Args:
        optimizer: any torch optimiser, also one that accelerate has wrapped.
        parameters: stacked A matrices; the first dimension counts tasks.
        frozen: some tasks must not move (`train_only`), so that an optimiser with other tensors is an error.

    Raises:
        TypeError: the optimiser does not run torch's hooks around its step.
        RuntimeError: in a step, where tasks are `frozen` and the optimiser steps other tensors.

    Note:
        A gradient of exactly zero also occurs while B is zero, before the first step: A then waits one step. State that
        is born in a step is what the optimiser makes of a gradient of zero.
    """

    def __init__(self, optimizer: Optimizer, parameters: Iterable[nn.Parameter], *, frozen: bool = False) -> None:
        self.optimizer, self._frozen = _stepping(optimizer), frozen
        self._parameters = [p for p in parameters if p.requires_grad]
        self._before: list[tuple[nn.Parameter, Tensor, Tensor, dict[str, Tensor]]] = []  # absent `[E]`, values, state
        self._told: set[str] = set()
        self._handles = (
            self.optimizer.register_step_pre_hook(self._remember),
            self.optimizer.register_step_post_hook(self._restore),
        )

    def remove(self) -> None:
        """Take the hooks off the optimiser."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._before = []
        for p in self._parameters:
            if p.grad is not None and id(p) in stepped:
                absent = (local(p.grad) == 0).flatten(1).all(1)  # now: the step may write into the gradient
                state = {key: value.clone() for key, value in tensors_of(optimizer, p)}
                self._before.append((p, absent, local(p).detach().clone(), state))
        if self._parameters and not self._before:
            if self._frozen:
                raise RuntimeError(f"{type(optimizer).__name__} steps copies of the matrices: {NOT_FROZEN}")
            self._tell_once(
                "elsewhere",
                f"{type(optimizer).__name__} steps other tensors than the model's A matrices (an optimiser inside it or"
                " a sharded copy does), so tasks that a batch does not hold are not kept as they are: choose another"
                " optimiser, such as optim='adamw_torch', or say keep_absent_tasks=False",
            )

    @torch.no_grad()
    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        seen: dict[int, bool] = {}  # tables such as qmap are one tensor for all parameters

        def changed(value: Tensor, old: Tensor) -> bool:
            if id(value) not in seen:
                seen[id(value)] = not torch.equal(value, old)
            return seen[id(value)]

        for whole, absent, values, before in self._before:
            p = local(whole)
            _put_back(p, values, absent)
            state = {key: value for key, value in tensors_of(optimizer, whole) if key in before}
            coded = any(value.dtype.itemsize == 1 for value in state.values())
            views = {key: by_task(value, p, coded=coded) for key, value in state.items()}
            mixed = [key for key, view in views.items() if view is None and changed(state[key], before[key])]
            for key, view in views.items():
                old, is_code = by_task(before[key], p, coded=coded), state[key].dtype.itemsize == 1
                if view is not None and old is not None and not (mixed and is_code):  # codes need their scale
                    _put_back(view, old, absent)
            if mixed:
                self._tell_once(
                    "mixed",
                    f"{type(optimizer).__name__} keeps {', '.join(mixed)} of an A of shape {tuple(p.shape)} for several"
                    " tasks together, so moments of tasks that a batch does not hold decay (their matrices stay as they"
                    " are): choose an optimiser with state per entry, such as optim='adamw_torch', a rank for which r *"
                    " in_features is a multiple of 256 for 8-bit state, or say keep_absent_tasks=False",
                )
        self._before = []

    def _tell_once(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(text, stacklevel=2)


class KeepingTrainer(Trainer):
    """What a Trainer whose `_keeps` is true does beside its own: `KeepAbsentTasks` on the optimiser of each `train`."""

    model: Any
    optimizer: Any
    _keeps: bool
    _keeper: KeepAbsentTasks | None = None

    def _prepare_for_training(self, *args: Any) -> Any:
        """As Trainer's, with the rows of absent tasks kept from now on: FSDP has replaced what the optimiser steps."""
        prepared = super()._prepare_for_training(*args)
        if self._keeper is not None:  # of an earlier `train`, whose optimiser may be this one
            self._keeper.remove()
        frozen = trained_part(self.model) is not None
        if frozen and (not self._keeps or self.is_fsdp_enabled or self.is_deepspeed_enabled):
            how = "keep_absent_tasks=False" if not self._keeps else "FSDP or DeepSpeed"
            raise ValueError(f"train_only with {how}: {NOT_FROZEN}")
        kept = stacked_a(self.model)
        self._keeper = KeepAbsentTasks(self.optimizer, kept, frozen=frozen) if self._keeps else None
        return prepared


def _stepping(optimizer: Any) -> Optimizer:
    """The optimiser that runs torch's hooks, below accelerate's wrapper; TypeError if there is none."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks"):
        if not hasattr(inner, "optimizer"):
            raise TypeError(
                f"{type(optimizer).__name__} runs no hooks around its step, so tasks that a batch does not hold cannot"
                " be kept as they are: use a torch.optim.Optimizer, or say keep_absent_tasks=False"
            )
        inner = inner.optimizer
    return inner  # type: ignore[no-any-return]


def by_task(value: Tensor, p: Tensor, *, coded: bool = False) -> Tensor | None:
    """A view of one state tensor of `p` `[E, R, K]` by task, tasks first; None where they cannot be told apart.

    `coded`: some state of p is codes of 8 bits, so that a vector holds the scales of equal blocks of p.
    """
    shape, (tasks, *rest) = tuple(value.shape), tuple(p.shape)
    shortened = [(tasks, *rest[:i], *rest[i + 1 :]) for i in range(len(rest))]
    kept = len(shape) == p.dim() and shape[0] == tasks and all(s in (1, d) for s, d in zip(shape, p.shape, strict=True))
    if kept or shape in shortened:
        return value
    if shape[1:] == tuple(p.shape):
        return value.transpose(0, 1)
    blocks = shape[-1] if coded and 1 <= len(shape) <= 2 else 0
    if not blocks or p.numel() % blocks or p[0].numel() % (p.numel() // blocks):  # the last: one reaches across tasks
        return None
    return value.view(tasks, -1) if len(shape) == 1 else value.view(shape[0], tasks, -1).transpose(0, 1)


def _put_back(target: Tensor, old: Tensor, absent: Tensor) -> None:
    target.copy_(torch.where(absent.view(-1, *[1] * (target.dim() - 1)), old, target))


def tensors_of(optimizer: Optimizer, p: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """The optimiser's tensors for one parameter, those inside of quantised tensors one by one; no step counts."""
    for key, value in optimizer.state.get(p, {}).items():
        if is_traceable_wrapper_subclass(value) and not is_traceable_wrapper_subclass(p):
            for name in value.__tensor_flatten__()[0]:
                yield f"{key}.{name}", getattr(value, name)
        elif isinstance(value, Tensor) and value.numel() > 1:
            yield key, local(value)


def local(tensor: Tensor) -> Tensor:
    """This process's tasks of a tensor that FSDP shards by its first dimension; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
