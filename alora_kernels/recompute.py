"""Activation checkpoints: running a part of a model again, in the backward pass, with the routing of its forward.

Users wrap what they checkpoint in `keep_routing`, the tuner does it for transformers. The recomputation runs long after
the forward: `adapter_names` is gone, `route` blocks are left, `set_task` and `set_adapter` may have changed. So each
checkpointed segment is run, both times, in a copy of the context it was first called in, and every layer in it notes
on the first run what it read from the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from typing import Any

import torch
from torch import nn

from .routing import in_this_context

#: what else must hold while a segment runs, both times, beside the variables of its context
around: ContextVar[Callable[[], AbstractContextManager[Any]]] = ContextVar("alora_around", default=nullcontext)
_notes: ContextVar[dict[int, Any] | None] = ContextVar("alora_checkpoint_notes", default=None)

REMEDY = (
    "call model.gradient_checkpointing_enable() and run the whole model, or wrap what you checkpoint:"
    " torch.utils.checkpoint.checkpoint(alora_kernels.keep_routing(block), x, use_reentrant=False)"
)


def keep_routing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, bound to the routing of this moment: every later call of it runs with the same routing.

    Give the result to an activation checkpoint, one for each forward.

    Example:
        >>> y = checkpoint(keep_routing(block), x, use_reentrant=False)
    """
    context = copy_context()
    context.run(_notes.set, {})

    def within(*args: Any, **kwargs: Any) -> Any:
        with around.get()():
            return function(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        # a context cannot be entered twice at once
        return context.copy().run(in_this_context, within, *args, **kwargs)

    return run


def replayed_state(layer: nn.Module, read: Callable[[], Any], routed: bool) -> Any:
    """What the layer reads from the model (active adapters, fixed tasks): as in the segment's first run.

    A RuntimeError if a layer that is `routed` by task ids is recomputed in the backward pass without `keep_routing`.
    """
    if torch.compiler.is_compiling():
        return read()
    notes = _notes.get()
    if notes is None:
        if routed and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "an ALoRA layer is being recomputed by an activation checkpoint that does not keep the routing of its"
                f" forward: {REMEDY}"
            )
        return read()
    if id(layer) not in notes:
        notes[id(layer)] = read()
    return notes[id(layer)]
