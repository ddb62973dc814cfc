"""One decoding step of a language model for a batch of requests, each of a task of its own, the context in a cache.

A step reads the same static cache each time and writes the same place in it, so every call is the same work. Judged are
the next token's logits; the truth is taken over the whole context, row by row under its adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from alora_kernels import route

from ..layers.providers import PROVIDERS
from ..report.rows import FORWARD, GRAPH
from .pair import FROZEN, FUSED, Pair, Step

STOCK = "PEFT mixed batch"
MODELS = (FROZEN, FUSED, STOCK)


class Decoding(Pair):
    direction, training = FORWARD, False
    stock_name = STOCK

    @property
    def m(self) -> int:
        return self.setting.rows  # a token of each

    def reason(self, name: str, mode: str) -> str | None:
        return PROVIDERS[STOCK].uncapturable if mode == GRAPH and name == STOCK else None

    def step_of(self, name: str) -> Step:
        """Logits `[rows, vocabulary]` of the last token of the context, over a cache with all tokens before it."""
        from transformers import StaticCache

        s = self.setting
        cache = StaticCache(config=self._of(name).config, max_cache_len=s.tokens)
        self._call(name, self.tokens[:, :-1], cache, torch.arange(s.tokens - 1, device=s.device))
        return partial(self._step, name, cache)

    @torch.no_grad()
    def _step(self, name: str, cache: Any) -> tuple[Tensor]:
        for layer in cache.layers:
            layer.cumulative_length.fill_(self.setting.tokens - 1)  # back to where the step begins
        return (self._call(name, self.tokens[:, -1:], cache, self._last),)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        model, found = self.double(), []
        with torch.no_grad():
            for row, name in enumerate(self._names):
                model.set_adapter(name)
                found.append(model(input_ids=self.tokens[row : row + 1], logits_to_keep=1).logits[0, -1])
        return {"logits": torch.stack(found)}

    def results(self, name: str, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"logits": outputs[0]}

    @cached_property
    def _last(self) -> Tensor:
        return torch.tensor([self.setting.tokens - 1], device=self.setting.device)

    @cached_property
    def _names(self) -> list[str]:
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
