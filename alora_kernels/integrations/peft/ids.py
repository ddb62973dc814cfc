"""`adapter_names`: what users say about the rows of a batch becomes ids for every adapter.

In:   the `adapter_names` of a forward or `generate` call: task names, or integer ids.
Out:  a `BatchRouting`, entered by `ALoRAModel` for the time of the call and read by each layer.
Who:  `ALoRAModel`; layers call `ids_for`.

Names are resolved per adapter, because adapters that are active together may have different tasks. A row
whose task one of them does not know gets nothing from that adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...modules.tasks import BASE, task_ids_from_names
from ...routing import ConstantRouting, Routing

INPUTS = ("input_ids", "inputs_embeds", "inputs", "input_features", "pixel_values", "decoder_input_ids")


class BatchRouting(Routing):
    """The `adapter_names` of one call.

    Args:
        names: one task name or id per row, or an integer tensor (per row or per token).
        tasks: the task names of each active adapter.

    Raises:
        ValueError: a name that no active adapter knows.
        TypeError: names are neither a list nor an integer tensor.
    """

    def __init__(self, names: Sequence[str | int] | Tensor, tasks: Mapping[str, Sequence[str]]) -> None:
        self.names: list[str | int] | None = None
        self._resolved: dict[tuple[str, ...], Routing] = {}
        if isinstance(names, Tensor):
            if names.is_floating_point() or names.is_complex() or names.dtype == torch.bool:
                raise TypeError(f"adapter_names must be task names or an integer tensor, got {names.dtype}")
            super().__init__(names)
            return
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(
                f"adapter_names must be a list with one task name per row, or an integer tensor, got {names!r}"
            )
        self.names = list(names)
        known = list(dict.fromkeys(task for group in tasks.values() for task in group))
        for name in self.names:
            if isinstance(name, str) and name != BASE and name not in known:
                raise ValueError(_unknown(name, known, tasks))
        super().__init__(self._ids(tuple(next(iter(tasks.values())))))

    def _ids(self, tasks: tuple[str, ...]) -> Tensor:
        assert self.names is not None
        rows = [BASE if isinstance(name, str) and name not in tasks else name for name in self.names]
        return task_ids_from_names(rows, tasks)

    def for_tasks(self, tasks: tuple[str, ...]) -> Routing:
        """The ids of this batch for an adapter with these tasks."""
        if self.names is None:
            return self
        if tasks not in self._resolved:
            self._resolved[tasks] = Routing(self._ids(tasks))
        return self._resolved[tasks]

    def check_batch(self, inputs: Tensor | None) -> None:
        """Raise unless there is one id per row of the inputs, or one per token.

        Raises:
            ValueError: with both numbers.
        """
        if inputs is None or inputs.dim() == 0:
            return
        ids, rows = self.task_ids, inputs.shape[0]
        tokens = inputs.shape[:2].numel()
        if ids.numel() == tokens or (ids.dim() == 1 and ids.numel() == rows):
            return
        raise ValueError(
            f"adapter_names has {ids.numel()} entries of shape {tuple(ids.shape)} but the batch has {rows} rows: give"
            f" one per row, or a tensor with one id per token {tuple(inputs.shape[:2])}"
        )


def _unknown(name: str, known: Sequence[str], adapters: Mapping[str, Any]) -> str:
    text = f"unknown task {name!r}: valid tasks are {', '.join(known)} and {BASE} (the base model alone)"
    return text + (f"; {name!r} is an adapter: choose it with set_adapter" if name in adapters else "")


def batch_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor among a call's arguments whose first dimension is the batch, if there is one."""
    for name in INPUTS:
        if isinstance(kwargs.get(name), Tensor):
            return kwargs[name]
    return next((arg for arg in args if isinstance(arg, Tensor)), None)


@lru_cache(maxsize=4)  # prefill and decoding shapes; each entry is 8 bytes per token
def _cached(task: int, leading: torch.Size, device: torch.device, inference: bool) -> Routing:
    return ConstantRouting(task)


def constant_routing(task: int, leading: torch.Size, device: torch.device) -> Routing:
    """The same task for every row, remembered so that a model of 200 layers makes its groups once.

    Tensors made while tracing, capturing or in inference mode are not handed to calls outside of it.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return ConstantRouting(task)
    return _cached(task, leading, device, torch.is_inference_mode_enabled())
