"""Attention of a serving step on a CPU: each request's queries meet the keys of that request, where the cache has them.

transformers' own way lets the queries of all requests meet all of their keys under a mask, with the key heads repeated.
An engine sets ours for its model while it runs, if a trial shows that the model computes the same with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from ..ops.attention import Segments, mask_function, segment_attention, unsupported
from ..routing import route

NAME, THEIRS = "alora_requests", "sdpa"  # as attention implementations of transformers
TRIAL = 8  # tokens
CLOSE = 1e-4, 0.05  # largest difference of the trial's logits over the largest logit: float32, 16 bits


class UnknownOptionError(NotImplementedError):
    """An attention module asks for what attention per request does not know."""

    def __init__(self, module: nn.Module, option: str) -> None:
        super().__init__(f"attention per request does not know {option} of {type(module).__name__}")
        self.option = option


_step: ContextVar[Segments | None] = ContextVar("alora_requests", default=None)


@contextmanager
def attending(segments: Segments | None) -> Iterator[None]:
    """The requests of the step that runs inside the block; None where the model keeps its own attention."""
    token = _step.set(segments)
    try:
        yield
    finally:
        _step.reset(token)


def segments_of(queries: Sequence[int], keys: Sequence[int], places: Tensor | None) -> Segments:
    """The segments of a step.

    Args:
        queries: new tokens of each request.
        keys: its tokens with those of the cache.
        places: where in the cache the keys of all requests lie, `[N]`; None if there are none but the new ones.
    """
    bounds = (list(accumulate(lengths, initial=0)) for lengths in (queries, queries if places is None else keys))
    return Segments(*bounds, k_places=places)


def why_not(model: PreTrainedModel) -> str | None:
    """Why the model cannot have this attention; None if it can. It is left as it was."""
    reason = _unfit(model)
    if reason is not None:
        return reason
    try:
        wanted = _trial(model)
        with _ours(model):
            found = _trial(model)
    except Exception as error:  # whatever a model can raise
        return f"its trial failed: {error}"
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= CLOSE[wanted.dtype.itemsize == 2]:
        return f"its logits differ by {difference:.2g} of the largest"
    return None


def left_out(model: PreTrainedModel) -> str | None:
    """What the model asks its attention for and transformers' paged attention, where it is eager, does not do."""
    if model.config._attn_implementation not in ("eager", "paged|eager") or not model._supports_attention_backend:
        return None
    try:
        with _ours(model):
            _trial(model)
    except UnknownOptionError as error:
        return error.option
    except Exception:  # it is not for the trial to say what is wrong
        return None
    return None


def take(model: PreTrainedModel) -> None:
    """Set this attention for the model."""
    model.set_attn_implementation(NAME)


def give_back(model: PreTrainedModel) -> None:
    """Set transformers' own again, if the model has this one."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(THEIRS)


@contextmanager
def _ours(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    take(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _unfit(model: PreTrainedModel) -> str | None:
    """Why the model cannot have it, as far as can be read."""
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None)
    if model.device.type != "cpu":
        return f"{model.device.type} has faster kernels"
    if model.config._attn_implementation != THEIRS:
        return f"it was loaded with attn_implementation={model.config._attn_implementation!r}"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} has no exchangeable attention"
    if types is None and getattr(text, "sliding_window", None) is not None:
        return "its layers attend within a window"
    return next((f"it has layers of the type {kind}" for kind in types or () if kind != "full_attention"), None)


@torch.no_grad()
def _trial(model: PreTrainedModel) -> Tensor:
    """Logits `[T, V]` of a few tokens under the base alone."""
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[union-attr, arg-type]
    ids = torch.linspace(0, vocabulary - 1, TRIAL, device=model.device).long()[None]
    with route(torch.full((1, TRIAL), -1)), attending(Segments([0, TRIAL], device=model.device)):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention function: q `[1, H, M, D]`, k and v `[1, G, M, D]`; y `[1, M, H, V]`."""
    segments = _step.get()
    if segments is None:
        raise RuntimeError("an engine serves from this model: submit the prompt to it, or stop it first")
    option = unsupported(options, segments.longest)
    if option is not None:
        raise UnknownOptionError(module, option)
    if attention_mask is not None or getattr(module, "sinks", None) is not None:
        raise NotImplementedError(f"{type(module).__name__} has {'sinks' if attention_mask is None else 'a mask'}")
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    if (cache := options.get("cache")) is not None:
        k, v = _cached(cache, module, k, v, options["write_index"], segments)
    return segment_attention(q, k, v, segments, scaling=scaling)[None], None


def _cached(
    cache: Any, module: Any, k: Tensor, v: Tensor, write_index: Sequence[Tensor], segments: Segments
) -> tuple[Tensor, Tensor]:
    """Put the new keys and values `[M, G, D]` into the paged cache; what the segments' places are places in."""
    allocator = cache.layer_to_allocator[module.layer_idx]
    keys, values = allocator._kv_token_views[module.layer_idx]
    places = write_index[allocator.index]
    keys.index_copy_(0, places, k.to(keys.dtype))
    values.index_copy_(0, places, v.to(values.dtype))
    # keys begin before the values in their common memory, so their view is longer
    return (k, v) if segments.places is None else (keys[: len(values)], values)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, mask_function)
