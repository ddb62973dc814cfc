"""transformers' activation checkpointing, made to keep the routing of each segment.

In:   a transformers model that may checkpoint its layers, now or later.
Out:  the same gradients, bit for bit, as without checkpointing; also with several forwards before one backward.
Who:  `ALoRAModel` and `ALoRATrainer` install `CheckpointGuard` on the base model; other code uses `keep_routing`.

Whoever turns checkpointing on, and when, the guard wraps the checkpoint function before each forward, so that
every segment runs through `alora_kernels.keep_routing`, which says why that is needed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..recompute import keep_routing
from ..routing import current_routing
from .ids import batch_shape
from .selection import learn_rows


class RoutedCheckpoint:
    """A checkpoint function of transformers that keeps the routing of each segment.

    Args:
        function: called as `function(segment, *args)`.

    Raises:
        ValueError: the function is a reentrant checkpoint.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        given = function.keywords if isinstance(function, functools.partial) else {}
        if given.get("use_reentrant"):
            raise ValueError(
                "reentrant activation checkpointing loses adapter gradients where no input requires one: use"
                ' gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}), or the same'
                " gradient_checkpointing_kwargs in TrainingArguments"
            )
        plain = isinstance(function, functools.partial) or function is torch.utils.checkpoint.checkpoint
        if plain and "use_reentrant" not in given:  # torch's default is still the reentrant kind
            function = functools.partial(function, use_reentrant=False)
        self.function = function

    @torch.compiler.disable  # a compiler can follow neither contexts nor what a layer notes in them
    def __call__(self, segment: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the checkpoint over a segment that remembers its routing."""
        return self.function(keep_routing(segment), *args, **kwargs)


class CheckpointGuard:
    """Forward pre-hook of the base model: ids must fit its batch, and checkpointing keeps the routing.

    Args:
        model: the base model; its modules that can checkpoint are found once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self.parameters = list(inspect.signature(model.forward).parameters)
        self.learned = False  # where the rows are in layers that could not be tried at injection

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward: check the ids, and keep the routing of every module that checkpoints."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names is an argument of the model that get_peft_model returns; call this model inside"
                " `with alora_kernels.route(ids):`, or fix one task with alora_kernels.set_task(model, task)"
            )
        routing = current_routing()
        shape = None if routing is None else batch_shape(self.parameters, args, kwargs)
        if routing is not None and shape is not None:
            routing.check_batch(*shape)
            if not self.learned and not torch.compiler.is_compiling():
                self.learned = learn_rows(model, args, kwargs, shape[0])
        for module in self.modules:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, "_gradient_checkpointing_func", None)
                if function is not None and not isinstance(function, RoutedCheckpoint):
                    module._gradient_checkpointing_func = RoutedCheckpoint(function)

    @classmethod
    def install(cls, model: nn.Module) -> None:
        """Hook the model, once; an adapter that was added may have layers of which nothing is known yet."""
        hooks = [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, cls)]
        for hook in hooks:
            hook.learned = False
        if not hooks:
            model.register_forward_pre_hook(cls(model), with_kwargs=True)

    @classmethod
    def remove(cls, model: nn.Module) -> None:
        """Give the model back as it was."""
        for key, hook in list(model._forward_pre_hooks.items()):
            if isinstance(hook, cls):
                del model._forward_pre_hooks[key]
                model._forward_pre_hooks_with_kwargs.pop(key, None)
                for module in hook.modules:
                    function = getattr(module, "_gradient_checkpointing_func", None)
                    if isinstance(function, RoutedCheckpoint):
                        module._gradient_checkpointing_func = function.function
