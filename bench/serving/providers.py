"""What can answer a load: the engine with mixed batches, and the ways stock PEFT has; each opens as a running server.

ours, mixed batches         one `Engine`; the T tasks of the load are loaded and stay on the device
ours, base alone            the same engine without a task: the ceiling
one task at a time          stock LoRAs and transformers' own continuous batching, whose manager lives through the
                            whole run: the task of the oldest request is next, with all that wait for it
..., merged                 the same with the LoRA merged into the weights before each batch, and taken out after it
PEFT mixed generate         `generate(adapter_names=...)` over left-padded waves; all answers have the same length
                            here, so nobody waits for a longer one
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore
from alora_kernels.serving.batching import cache_config
from alora_kernels.serving.openmp import release_workers

from .adapters import Adapters, sharing
from .load import LONGEST, Load, Outcome, Request, by_task
from .rows import BASE, MERGED, MIXED, OURS, SERIAL

Serve = Callable[[Sequence[Request], int], list[Outcome]]  # requests, new tokens for each
PAGE = 32  # tokens of a page of the cache
MOST_LORAS = 64
PATIENCE = 600  # seconds without a token after which a server counts as stuck


@dataclass
class Stage:
    """What the providers share; they run copies of `base` over the same weights, adapter folders go to `folder`."""

    base: Any
    tokenizer: Any
    adapters: Adapters
    folder: Path
    stores: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    loras: dict[tuple[str, int], Any] = field(default_factory=dict)

    def store(self, tasks: int) -> tuple[Any, Any]:
        """A copy of the base with so many tasks in it, and their store; made once."""
        if tasks not in self.stores:
            folder = self.adapters.write(self.folder / f"alora-{tasks}", tasks)
            model = sharing(self.base)
            self.stores[tasks] = model, TaskStore.open(model, [folder], resident=tasks)
        return self.stores[tasks]

    def lora(self, kind: str, tasks: int) -> Any:
        """A PEFT model with so many LoRAs; made once. Merging changes the weights, so it has its own."""
        if (kind, tasks) not in self.loras:
            base = copy.deepcopy(self.base) if kind == MERGED else sharing(self.base)
            self.loras[kind, tasks] = self.adapters.stock(base, range(tasks))
        return self.loras[kind, tasks]


class Provider(Protocol):
    """One way to answer."""

    name: str
    extras: Mapping[str, float | None]  # further columns of the row of its last call

    def missing(self, load: Load) -> str | None: ...  # why it takes no part under this load

    def adapter_bytes(self, load: Load) -> int: ...  # what the weights of all tasks take

    def opened(self, load: Load) -> AbstractContextManager[Serve]: ...  # a server, stopped at the end of the block


class Ours:
    extras: Mapping[str, float | None] = {}

    def __init__(self, stage: Stage, *, base: bool = False) -> None:
        self._stage, self._base, self.name = stage, base, BASE if base else OURS

    def missing(self, load: Load) -> str | None:
        return None

    def adapter_bytes(self, load: Load) -> int:
        adapters = self._stage.adapters
        return 0 if self._base else load.tasks * adapters.a_bytes + adapters.b_bytes

    @contextmanager
    def opened(self, load: Load) -> Iterator[Serve]:
        model, store = self._stage.store(load.tasks)
        with Engine(model, self._stage.tokenizer, store, _engine_config(load)) as engine:
            yield partial(self._serve, engine, load.concurrency)

    def _serve(self, engine: Any, concurrency: int, requests: Sequence[Request], new_tokens: int) -> list[Outcome]:
        wanted = [replace(request, task=None) if self._base else request for request in requests]
        return asyncio.run(_closed_loop(engine, self._stage.adapters, concurrency, wanted, new_tokens))


async def _closed_loop(
    engine: Any, adapters: Adapters, concurrency: int, requests: Sequence[Request], new_tokens: int
) -> list[Outcome]:
    """As many clients as there may be requests in flight, each sends its next one when it has its answer."""
    outcomes: dict[int, Outcome] = {}
    queue = iter(enumerate(requests))
    sampling = Sampling(max_tokens=new_tokens, temperature=0, ignore_eos=True)

    async def client() -> None:
        for index, request in queue:
            task = None if request.task is None else adapters.name(request.task)
            start = time.perf_counter()
            done = await engine.submit(list(request.prompt), task=task, sampling=sampling).wait()
            end = time.perf_counter() - start
            if done.error is not None or done.queued is None or done.first_token is None:
                raise RuntimeError(f"request {index} ended with {done.finish_reason}: {done.error}")
            outcomes[index] = Outcome(request, tuple(done.token_ids), done.queued, done.first_token, end)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [outcomes[i] for i in range(len(requests))]


class Stock:
    """What the providers with a stock LoRA for each task have in common."""

    extras: Mapping[str, float | None] = {}

    def __init__(self, stage: Stage, name: str) -> None:
        self._stage, self.name = stage, name

    def missing(self, load: Load) -> str | None:
        if load.tasks > MOST_LORAS:
            return f"{load.tasks} LoRAs take minutes to load into PEFT; at {MOST_LORAS} they show what they cost"
        return None

    def adapter_bytes(self, load: Load) -> int:
        return load.tasks * self._stage.adapters.lora_bytes


class Serial(Stock):
    def __init__(self, stage: Stage, *, merged: bool = False) -> None:
        super().__init__(stage, MERGED if merged else SERIAL)
        self._merged = merged

    @contextmanager
    def opened(self, load: Load) -> Iterator[Serve]:
        model = self._stage.lora(self.name, load.tasks)
        batching = cache_config(_engine_config(load))
        greedy = GenerationConfig(do_sample=False, max_new_tokens=load.new_tokens, eos_token_id=-1)
        with model.get_base_model().continuous_batching_context_manager(
            generation_config=greedy, continuous_batching_config=batching
        ) as manager:
            release_workers()  # as the engine does: its thread, too, is slowed by workers of this one
            yield partial(self._serve, model, manager, load.concurrency)

    def _serve(
        self, model: Any, manager: Any, concurrency: int, requests: Sequence[Request], new_tokens: int
    ) -> list[Outcome]:
        start, outcomes = time.perf_counter(), dict[int, Outcome]()
        arrived = [0.0] * min(concurrency, len(requests))
        for batch in by_task(requests, concurrency):
            taken = time.perf_counter() - start
            with self._holding(model, self._stage.adapters.name(requests[batch[0]].task or 0)):
                for i, first, end, tokens in self._batch(manager, batch, requests, new_tokens):
                    up, began, ended = (moment - arrived[i] for moment in (taken, first - start, end - start))
                    outcomes[i] = Outcome(requests[i], tokens, up, began, ended)
            arrived += [time.perf_counter() - start] * len(batch)
        return [outcomes[i] for i in range(len(requests))]

    @contextmanager
    def _holding(self, model: Any, adapter: str) -> Iterator[None]:
        model.set_adapter(adapter)
        if not self._merged:
            yield
            return
        model.merge_adapter([adapter])
        try:
            yield
        finally:
            model.unmerge_adapter()

    def _batch(
        self, manager: Any, batch: Sequence[int], requests: Sequence[Request], new_tokens: int
    ) -> Iterator[tuple[int, float, float, tuple[int, ...]]]:
        """All requests of one task: what `generate_batch` does with a manager that is running."""
        ids = {}
        for i in batch:
            prompt = list(requests[i].prompt)
            name = manager.add_request(prompt, max_new_tokens=new_tokens, record_timestamps=True, eos_token_id=-1)
            ids[name] = i
        for _ in batch:
            done = manager.get_result(timeout=PATIENCE)
            if done is None or done.error is not None:
                raise RuntimeError(f"continuous batching stopped: {done.error if done else 'no result'}")
            yield ids[done.request_id], done.timestamps[0], done.timestamps[-1], tuple(done.generated_tokens)


class Mixed(Stock):
    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, MIXED)

    @contextmanager
    def opened(self, load: Load) -> Iterator[Serve]:
        yield partial(self._serve, self._stage.lora(self.name, load.tasks), load.concurrency)

    def _serve(self, model: Any, concurrency: int, requests: Sequence[Request], new_tokens: int) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for begin in range(0, len(requests), concurrency):
            outcomes += self._wave(model, requests[begin : begin + concurrency], new_tokens)
        return outcomes

    @torch.no_grad()
    def _wave(self, model: Any, wave: Sequence[Request], new_tokens: int) -> list[Outcome]:
        start, stamp = time.perf_counter(), _Stamp()
        prompts = [{"input_ids": list(request.prompt)} for request in wave]
        inputs = self._stage.tokenizer.pad(prompts, padding_side="left", return_tensors="pt")
        out = model.generate(
            **inputs,
            adapter_names=[self._stage.adapters.name(request.task or 0) for request in wave],
            max_new_tokens=new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamp]),
        )
        end = time.perf_counter() - start
        answers = out[:, inputs["input_ids"].shape[1] :].tolist()
        first = (stamp.first or 0.0) - start
        return [Outcome(request, tuple(ids), 0.0, first, end) for request, ids in zip(wave, answers, strict=True)]


class _Stamp(StoppingCriteria):
    """Stops nothing; remembers when it was first asked, which is when the first token exists."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _engine_config(load: Load) -> EngineConfig:
    """Room for all that may be in flight, none to spare; both ways of continuous batching take their sizes from it."""
    context = LONGEST + load.new_tokens
    cache = load.concurrency * -(-context // PAGE) * PAGE
    return EngineConfig(load.concurrency, 2 * load.concurrency, context, cache, page_size=PAGE)


def providers_of(stage: Stage) -> dict[str, Provider]:
    """All of them by name; nothing is built yet."""
    listed: list[Provider] = [Ours(stage), Ours(stage, base=True), Serial(stage), Serial(stage, merged=True)]
    return {provider.name: provider for provider in [*listed, Mixed(stage)]}
