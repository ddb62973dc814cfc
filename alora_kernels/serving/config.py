"""How large an engine is, and what it looks like at one moment.

In:   sizes from the user; the model's limits.
Out:  `EngineConfig` with every size known; `Stats`.
Who:  `Engine`; the command line and the server read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

State = Literal["new", "ready", "draining", "stopped", "failed"]
LONGEST = 4096  # tokens of context without being asked for more
PER_REQUEST = 512  # cached tokens per request of a batch, if not said otherwise


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine.

    Attributes:
        max_batch: requests that run at once.
        max_waiting: requests that may wait; one more is refused.
        max_context: prompt and answer together, in tokens; None takes the model's limit, 4096 at most.
        cache_tokens: tokens the KV cache holds, all requests together; None is 512 per request of `max_batch`, never
            less than `max_context`. When it is full, a request gives up its blocks and is computed again later.
        batch_tokens: tokens of one step; a longer prompt is read in several steps, between which others go on.
        page_size: tokens per block of the cache.

    Raises:
        ValueError: a size that is too small, or a cache smaller than one request may need.
    """

    max_batch: int = 32
    max_waiting: int = 256
    max_context: int | None = None
    cache_tokens: int | None = None
    batch_tokens: int = 512
    page_size: int = 32

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_waiting", "max_context", "cache_tokens", "batch_tokens", "page_size"):
            value, least = getattr(self, name), {"max_context": 2, "page_size": 4}.get(name, 1)
            if value is not None and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

    def resolved(self, model: Any) -> EngineConfig:
        """The same with every size known, for this model.

        Raises:
            ValueError: see the class.
        """
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
        context = self.max_context or min(limit, LONGEST)
        if context > limit:
            raise ValueError(f"max_context is {context} but the model reads at most {limit} tokens")
        cache = self.cache_tokens or max(context, PER_REQUEST * self.max_batch)
        if cache < context:
            raise ValueError(
                f"cache_tokens is {cache}, less than one request of max_context={context} needs: raise the one or lower"
                " the other"
            )
        batch = max(self.batch_tokens, self.max_batch)
        return EngineConfig(self.max_batch, self.max_waiting, context, cache, batch, self.page_size)


@dataclass(frozen=True)
class Stats:
    """An engine at one moment.

    Attributes:
        state: "new", "ready", "draining", "stopped" or "failed".
        running, waiting: requests.
        max_batch, max_waiting: their limits.
        batch_rows, batch_requests: tokens and requests in the last step.
        tokens_per_second: generated, over the last two seconds.
        requests_finished, tokens_generated: since the start.
        tasks_resident, tasks_known: tasks whose rows are in the model, and all.
        uptime: seconds since the start.
        cache_used: share of the KV cache in use, 0 .. 1.
    """

    state: State
    running: int
    waiting: int
    max_batch: int
    max_waiting: int
    batch_rows: int
    batch_requests: int
    tokens_per_second: float
    requests_finished: int
    tokens_generated: int
    tasks_resident: int
    tasks_known: int
    uptime: float
    cache_used: float
