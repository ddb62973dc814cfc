"""The output layer of a language model, asked only at positions that have a label.

The whole model is called, wrappers and all, but its output layer then keeps the hidden states it is given and returns
logits of no class. Whether a model's loss can be had this way is proven once, on the rows of `ModelLoss.learn`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..modules.linear import FusedALoRALinear
from ..routing import PickedRouting, Routing, current_routing, route
from .chunked_loss import Head, PositionLosses, chunked_cross_entropy
from .rules import IGNORED, base_model, text_config

SPREAD = 10  # the proof tries largest logits from 1 to 2^10: a soft cap shows only in large ones


class Given(NamedTuple):
    """What the output layer was given in a call of the model, and what held there."""

    hidden: Tensor  # `[B, T, H]`
    routing: Routing | None
    autocast: torch.dtype | None


class OutputHead:
    """An output layer that can be asked by position, and what the model makes of it: `softcap(scale * layer(h))`."""

    def __init__(self, module: Any, config: Any) -> None:
        _check_layer(module)
        self.module = module
        self.trained = [p for p in module.parameters() if p.requires_grad]
        self.multipliers = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
        self.divisor = getattr(config, "logits_scaling", None)
        self.softcap = getattr(config, "final_logit_softcapping", None)

    def post(self, logits: Tensor) -> Tensor:
        """What the model makes of the layer's output: Cohere and Falcon-H1 multiply, Granite divides, Gemma caps."""
        for factor in self.multipliers:
            logits = logits if factor is None else logits * factor
        if self.divisor is not None:
            logits = logits / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def capture(self, call: Callable[[], Any]) -> tuple[Any, Given]:
        """Outputs of a call of the model, with logits `[B, T, 0]`, and what its output layer was given."""
        given: list[Given] = []

        def keep(hidden: Tensor) -> Tensor:
            given.append(_given(hidden))
            return hidden[..., :0]

        with _forward_of(self.module, keep):
            outputs = call()
        if len(given) != 1:
            raise RuntimeError(f"the output layer was called {len(given)} times in one call of the model")
        return outputs, given[0]

    def losses(self, given: Given, labels: Tensor, label_smoothing: float = 0.0) -> PositionLosses:
        """Losses of the labelled positions, as they come in the flattened labels `[B, T]`."""
        if given.hidden.shape[:-1] != labels.shape:
            raise ValueError(
                f"hidden states of shape {tuple(given.hidden.shape)} and labels of shape {tuple(labels.shape)} cannot"
                " be aligned: they must have the same rows and positions"
            )
        asked = (labels.flatten() != IGNORED).nonzero()[:, 0]
        hidden = given.hidden.flatten(0, -2)[asked.to(given.hidden.device)]
        return self._losses(hidden, labels.flatten()[asked], self._head(given, asked), label_smoothing)

    def _losses(self, hidden: Tensor, labels: Tensor, head: Head, label_smoothing: float = 0.0) -> PositionLosses:
        vocabulary = _linear_of(self.module).out_features
        return chunked_cross_entropy(hidden, labels, head, vocabulary, self.trained, label_smoothing)

    def _head(self, given: Given, places: Tensor) -> Head:
        """Logits of slices of these places, as the model would make them there."""

        def head(part: Tensor, at: slice) -> Tensor:
            return self.post(self._layer(given, part, places[at]))

        return head

    def _layer(self, given: Given, hidden: Tensor, places: Tensor) -> Tensor:
        with contextlib.ExitStack() as stack:
            kind, dtype = hidden.device.type, given.autocast
            stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None))
            if given.routing is not None:
                stack.enter_context(route(PickedRouting(given.routing, given.hidden.shape[:-1], places)))
            logits: Tensor = self.module(hidden)
            return logits

    def prove(self, call: Callable[[], Any]) -> None:
        """Raise a ValueError unless the model's logits are ours, and losses and gradients those of plain autograd.

        `call` is the model on a few rows without labels. The layer's output is spread over many sizes on its way to
        the model, so that a cap or a scale shows whatever the weights are; adapters of the layer drop nothing out.
        """
        seen: list[tuple[Given, Tensor]] = []
        forward = self.module.forward

        def spread(hidden: Tensor) -> Tensor:
            logits = forward(hidden)
            largest = logits.flatten(0, -2).abs().amax(-1, keepdim=True)
            largest = largest.masked_fill(largest == 0, 1)  # masked padding whose embedding is 0
            sizes = torch.logspace(0, SPREAD, len(largest), base=2, device=logits.device)[:, None]
            factors = (sizes / largest.float()).to(logits.dtype)
            seen.append((_given(hidden), factors))
            return (logits.flatten(0, -2) * factors).view_as(logits)

        with without_dropout(self.module):
            with _forward_of(self.module, spread):
                outputs = call()
            if len(seen) != 1:
                raise ValueError(f"the output layer is called {len(seen)} times")
            given, factors = seen[0]
            places = torch.arange(len(factors), device=factors.device)
            hidden, theirs = given.hidden.flatten(0, -2).detach(), outputs["logits"]
            ours = self.post(self._layer(given, hidden, places) * factors)
            if theirs.numel() != ours.numel() or not _close(theirs.flatten(0, -2), ours):
                raise ValueError("the model does to its logits what is not known")
            self._prove_gradient(hidden, self._head(given, places))
        outputs, given = self.capture(call)
        if outputs["logits"].shape != (*given.hidden.shape[:-1], 0):
            raise ValueError(f"the model gives logits of shape {tuple(outputs['logits'].shape)} for none")

    def _prove_gradient(self, hidden: Tensor, head: Head) -> None:
        with torch.enable_grad():
            hidden = hidden.requires_grad_()
            logits = head(hidden, slice(None))
            strangers = [t for t in _leaves(logits) if all(t is not known for known in (hidden, *self.trained))]
            if strangers:
                raise ValueError("the output layer trains what is not among its parameters")
            labels = torch.arange(len(hidden), device=hidden.device) % logits.shape[-1]
            want = F.cross_entropy(logits.float(), labels, reduction="sum")
            got = self._losses(hidden, labels, head).total
            pairs = [torch.autograd.grad(value, hidden)[0] for value in (got, want)]
        same = torch.isclose(got, want, rtol=1e-4)
        if logits.shape[-1] != _linear_of(self.module).out_features or not (same and _close(*pairs)):
            raise ValueError("loss or gradient differ from those of plain autograd")


def find_head(model: Any) -> OutputHead:
    """The output layer of a model, wrapped or not; a ValueError with the reason if it cannot be asked by position."""
    inside = _inside(model)
    if not isinstance(inside, PreTrainedModel | PeftModel):
        raise ValueError(f"{type(inside).__name__} is around the model, or is no model of transformers")
    base = base_model(inside)
    if any(m._compiled_call_impl is not None for m in (inside, base)):
        raise ValueError("the model is compiled")
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError("the model is an encoder and a decoder")
    module = output_layer(model)
    if module is None:
        raise ValueError(f"{type(base).__name__} names no output embeddings")
    head = OutputHead(module, text_config(base.config))
    if inside is not model and (head.trained or model.static_graph):
        raise ValueError("DistributedDataParallel must see the output layer train in the forward, or a static graph")
    return head


def output_layer(model: Any) -> Any:
    """What a model names as its output layer, None without one; which one that is may change with its adapters."""
    base = base_model(_inside(model))
    return base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None


def _inside(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _linear_of(module: Any) -> Any:
    """The layer inside PEFT's wrappers."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        module = module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_layer(module: Any) -> None:
    inner = _linear_of(module)
    if type(inner) not in (nn.Linear, FusedALoRALinear):
        raise ValueError(f"the output layer is a {type(inner).__name__}, not a linear layer")
    for part in module.modules():
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
        if any(hooks) or "forward" in vars(part):
            raise ValueError("the output layer has hooks, or a forward that somebody replaced")
    for parameter in module.parameters():
        if type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
            raise ValueError(f"the output layer's weight is a {type(parameter).__name__}, or is sharded")


def _given(hidden: Tensor) -> Given:
    kind = hidden.device.type
    on = torch.is_autocast_enabled(kind)
    return Given(hidden, current_routing(), torch.get_autocast_dtype(kind) if on else None)


@contextlib.contextmanager
def _forward_of(module: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, and every part back to the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal to rounding of their dtype, measured at the largest number of each row."""
    if one.shape != other.shape:
        return False
    wide = torch.promote_types(other.dtype, torch.float32)
    largest = other.abs().amax(-1, keepdim=True).to(wide).clamp_min(torch.finfo(torch.float32).tiny)
    error = (one.to(wide) - other.to(wide)).abs_().div_(largest)
    return bool((error <= 16 * torch.finfo(other.dtype).eps + 1e-4).all())


def _leaves(tensor: Tensor) -> list[Tensor]:
    """Leaf tensors that a gradient of this one reaches."""
    found, known, todo = [], set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found
