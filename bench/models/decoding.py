"""One decoding step of a language model for a batch of requests, each of a task of its own.

In:   a base and a `Setting`: as many tasks as rows, tokens of context.
Out:  candidates for the runner: the next token's logits, with the context in a static cache.
Who:  `bench.gpu`, beside the base alone.

A step reads the same cache each time and writes the same place in it, so every call is the same work. The truth is
stock PEFT in float64 over the whole context, row by row under its adapter; what is allowed is twice the error of stock
PEFT in the same dtype with `adapter_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from alora_kernels import route

from .. import cuda
from ..layers.layer import FORWARD
from ..layers.problem import Check
from ..layers.providers import PROVIDERS
from ..layers.work import Ready
from ..report.rows import GRAPH
from .pair import FROZEN, FUSED, TINY, Pair, Setting, finite, judged, worst_of

STOCK = "PEFT mixed batch"
MODELS = (FROZEN, FUSED, STOCK)


class DecodingWork:
    """The step and its candidates."""

    directions: Sequence[str] = (FORWARD,)
    repeats: float = 1

    def __init__(
        self, names: Sequence[str], base: Callable[[], Any], setting: Setting, *, width: int, note: str
    ) -> None:
        self.names = names
        self._models = _Models(base, setting)
        self.row = setting.row(width, note, tokens=1)

    def candidates(self) -> Sequence[DecodingCandidate]:
        """Nothing is built before a candidate is prepared."""
        return [DecodingCandidate(name, self._models) for name in self.names]


class DecodingCandidate:
    """One of the models."""

    def __init__(self, name: str, models: _Models) -> None:
        self.name, self._models = name, models
        self.computes = "frozen" if name == FROZEN else "task"

    def reason(self, direction: str, mode: str) -> str | None:
        """Stock PEFT sorts the names on the host, which no graph can hold."""
        return PROVIDERS[STOCK].uncapturable if mode == GRAPH and self.name == STOCK else None

    def prepare(self, direction: str, mode: str) -> Ready:
        """Fill the cache, take a step, judge its logits."""
        step: Callable[[], Sequence[Tensor]] = partial(self._models.step, self.name, self._models.filled(self.name))
        peak = cuda.peak_mb(step, self._models.setting.device)
        if mode == GRAPH:
            step = cuda.capture(step)
        return Ready(step, self._models.check(self.name, step()[0]), peak)


class _Models(Pair):
    """Steps of the models, and the truth about them."""

    training = False

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Logits of each row's last token in float64."""
        model, found = self.double(), []
        with torch.no_grad():
            for row, name in enumerate(self._names):
                model.set_adapter(name)
                found.append(model(input_ids=self.tokens[row : row + 1], logits_to_keep=1).logits[0, -1])
        return {"logits": torch.stack(found)}

    @cached_property
    def allowed(self) -> float:
        """Twice the error of stock PEFT in this dtype, and a tiny bit."""
        logits = self.step(STOCK, self.filled(STOCK))[0]
        return 2 * worst_of({"logits": logits}, self.truth)[0] + TINY

    def check(self, name: str, logits: Tensor) -> Check:
        """The logits against the truth; the frozen model is transformers' own."""
        if name == FROZEN:
            return finite(logits, "logits")
        return judged({"logits": logits}, self.truth, self.allowed)

    def filled(self, name: str) -> Any:
        """A static cache with all tokens of the context but the last."""
        from transformers import StaticCache

        model, s = self._of(name), self.setting
        cache = StaticCache(config=model.config, max_cache_len=s.tokens)
        places = torch.arange(s.tokens - 1, device=s.device)
        self._call(name, self.tokens[:, :-1], cache, places)
        return cache

    @torch.no_grad()
    def step(self, name: str, cache: Any) -> tuple[Tensor]:
        """Logits `[rows, vocabulary]` of the last token of the context."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(self.setting.tokens - 1)  # back to where the step begins
        return (self._call(name, self.tokens[:, -1:], cache, self._last),)

    @cached_property
    def _last(self) -> Tensor:
        return torch.tensor([self.setting.tokens - 1], device=self.setting.device)

    @cached_property
    def _names(self) -> list[str]:
        """The adapter of each row."""
        return [str(task) for task in self.ids.tolist()]

    @torch.no_grad()
    def _call(self, name: str, tokens: Tensor, cache: Any, places: Tensor) -> Tensor:
        inputs = {"input_ids": tokens, "past_key_values": cache, "cache_position": places, "logits_to_keep": 1}
        inputs["position_ids"] = places[None]
        model = self._of(name)
        if name == STOCK:
            return model(**inputs, adapter_names=self._names).logits[:, -1]
        if name == FROZEN:
            return model(**inputs).logits[:, -1]
        with route(self.ids):
            return model(**inputs).logits[:, -1]

    def _of(self, name: str) -> Any:
        return self.stock if name == STOCK else self.frozen if name == FROZEN else self.fused
