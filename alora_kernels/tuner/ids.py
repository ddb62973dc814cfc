"""`adapter_names`: what users say about the rows of a batch becomes ids for every adapter.

In:   the `adapter_names` of a forward or `generate` call: task names, or integer ids.
Out:  a `BatchRouting`, entered by `ALoRAModel` for the time of the call and read by each layer.
Who:  `ALoRAModel`; layers call `ids_for`.

Each forward of the base model, those inside `generate` too, checks that the ids fit its rows (`CheckpointGuard`).
Names are resolved per adapter, because adapters that are active together may have different tasks. A row
whose task one of them does not know gets nothing from that adapter.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..modules.tasks import BASE, task_ids_from_names
from ..routing import ConstantRouting, Routing

TEXT = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids", "decoder_inputs_embeds")
INPUTS = (*TEXT, "encoder_outputs", "input_features", "input_values", "pixel_values")  # whose rows are the batch's


class BatchRouting(Routing):
    """The `adapter_names` of one call.

    Args:
        names: one task name or id per row, or an integer tensor (per row or per token).
        tasks: the task names of each active adapter.

    Raises:
        ValueError: a name that no active adapter knows.
        TypeError: names are neither a list nor an integer tensor.
    """

    given_as = "adapter_names"

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
            self._resolved[tasks] = Routing(self._ids(tasks), self.repeats)
        self._resolved[tasks].one_row = self.one_row
        return self._resolved[tasks]

    def repeated(self, repeats: int) -> BatchRouting:
        """As `Routing.repeated`, for every adapter."""
        other = copy.copy(self)
        other.repeats, other._groups, other._resolved = repeats, {}, {}
        return other


def _unknown(name: str, known: Sequence[str], adapters: Mapping[str, Any]) -> str:
    text = f"unknown task {name!r}: valid tasks are {', '.join(known)} and {BASE} (the base model alone)"
    return text + (f"; {name!r} is an adapter: choose it with set_adapter" if name in adapters else "")


def batch_shape(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int | None] | None:
    """(rows, tokens) of the batch that a model is called with; None if no argument tells.

    The tokens are None where the inputs are no text. A vision-language model's images are not its rows, so the names
    decide; of a model that uses none of them, its first tensor is the batch, also inside of a dict, list or tuple.

    Args:
        names: the parameters of the model's forward, for its positional arguments.
        args, kwargs: of the call.
    """
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    for key, nested in list(given.items()):
        if key not in INPUTS and isinstance(nested, Mapping | list | tuple):
            leaves = tree_leaves(dict(nested) if isinstance(nested, Mapping) else nested)
            given[key] = next((v for v in leaves if isinstance(v, Tensor) and v.dim() > 0), None)
    first = next((name for name, value in given.items() if isinstance(value, Tensor) and value.dim() > 0), None)
    for name in (*INPUTS, first):
        value = given.get(name) if name is not None else None
        if name == "encoder_outputs" and value is not None:
            value = value[0]
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        whole = value.shape if not value.is_floating_point() else value.shape[:-1]
        return value.shape[0], whole.numel() if name in TEXT or name not in INPUTS else None
    return None


def beams(model: Any, kwargs: Mapping[str, Any]) -> int:
    """How many consecutive rows `model.generate(**kwargs)` makes of each row of its batch."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    wanted = [kwargs.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    twice = hasattr(model, "_expand_variables_for_generation")  # Whisper repeats its rows by both
    return math.prod(wanted) if twice else max(wanted)


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
