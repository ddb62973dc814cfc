"""The table of requests: who waits, who runs, who has ended, and the numbers `/metrics` shows of them.

It is the one thing that all threads of an engine share: `Engine` and `Admission` write into it, `TaskBatching` tells it
of tokens and iterations. A request that has ended stays among the running until the loop no longer has it, and only
then is its lease given back: its rows cannot be overwritten while a step may still read them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .request import Completion, FinishReason, Generation, Logprob, NotServingError, Piece, QueueFullError, ServingError
from .sampling import Row
from .store import Lease, TaskStore
from .text import TextStream

log = logging.getLogger("alora_kernels.serving")
State = Literal["new", "ready", "draining", "stopped", "failed"]
WINDOW = 2.0  # seconds over which tokens per second are counted
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
BASE_LABEL, GONE_LABEL = "(base)", "(unloaded)"  # parentheses are in no task's name


class Metrics:
    """Counters and histograms of one engine in a registry of its own; `answered` requests ended without an error.

    What counts requests changes under `lock` alone, so at any time those taken are those that have ended, run and wait.
    """

    def __init__(self, lock: AbstractContextManager[Any], store: TaskStore | None) -> None:
        self._lock, self._store, self._tasks = lock, store, set[str]()
        own = self.registry = CollectorRegistry()
        self.taken = Counter("alora_requests_taken", "requests that were taken, to run or to wait", registry=own)
        self.requests = Counter("alora_requests", "requests that have ended", ["task", "finish_reason"], registry=own)
        self.refused = Counter("alora_requests_refused", "requests that were not taken", ["reason"], registry=own)
        self.prompt_tokens = Counter("alora_prompt_tokens", "tokens of prompts", ["task"], registry=own)
        self.tokens = Counter("alora_generated_tokens", "tokens generated", ["task"], registry=own)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, what, registry=own, buckets=buckets)

        self.first_token = histogram("alora_time_to_first_token_seconds", "to the first token of an answer", SECONDS)
        self.seconds = histogram("alora_request_seconds", "from submission to the end of an answer", SECONDS)
        self.batch_tokens = histogram("alora_batch_tokens", "tokens in a step", ROWS)
        self.batch_requests = histogram("alora_batch_requests", "requests in a step", ROWS)
        self.restarts = Counter("alora_engine_restarts", "generation loops that died and were replaced", registry=own)
        self.answered = 0

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """Add a value that is read when it is asked for."""
        Gauge(name, what, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """The registry in Prometheus' text format."""
        with self._lock:
            self._fold()
            now = list(self.registry.collect())
        return generate_latest(SimpleNamespace(collect=lambda: now))  # type: ignore[arg-type]  # it asks for no more

    def _fold(self) -> None:
        """Count what tasks had that were unloaded under one name: their series go, and sums stay what they are."""
        gone = set() if self._store is None else self._tasks.difference(self._store.names())
        self._tasks -= gone
        for counter in (self.requests, self.prompt_tokens, self.tokens) if gone else ():
            samples = [sample for family in counter.collect() for sample in family.samples]
            for _, labels, value, *_ in [s for s in samples if s.name.endswith("_total") and s.labels["task"] in gone]:
                counter.labels(**(labels | {"task": GONE_LABEL})).inc(value)
                counter.remove(*labels.values())

    def ended(self, completion: Completion) -> None:
        """Count a request that has ended; the times of answers that were cut off are not those of answers."""
        self.answered += completion.finish_reason != "error"
        task = BASE_LABEL if completion.task is None else completion.task
        if completion.task is not None and task not in self._tasks:
            self._fold()  # also where nobody asks for the text
            self._tasks.add(task)
        self.requests.labels(task, completion.finish_reason).inc()
        self.prompt_tokens.labels(task).inc(completion.prompt_tokens)
        self.tokens.labels(task).inc(completion.completion_tokens)
        if completion.finish_reason in ("stop", "length"):
            self.seconds.observe(completion.seconds)
            if completion.first_token is not None:
                self.first_token.observe(completion.first_token)


@dataclass(eq=False)
class Run:
    """One request, from its submission until the loop has let go of it."""

    generation: Generation
    prompt: list[int]
    row: Row
    text: TextStream
    ends: Sequence[int] = ()  # tokens that end its task's answers, beside the table's
    lease: Lease | None = None  # from its submission on
    tokens: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    scores: list[list[tuple[int, float]]] = field(default_factory=list)  # of each token: its own, then the likeliest
    logprobs: list[Logprob] = field(default_factory=list)
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None
    first: float | None = None
    ended: bool = False

    def completion(self, reason: FinishReason, error: str | ServingError | None, now: float) -> Completion:
        """Its result, for one that ends `now`."""
        return Completion(
            self.generation.id,
            self.generation.task,
            "".join(self.parts),
            tuple(self.tokens),
            reason,
            len(self.prompt),
            None if error is None else str(error),
            error if isinstance(error, ServingError) else None,
            queued=None if self.started is None else self.started - self.submitted,
            first_token=None if self.first is None else self.first - self.submitted,
            seconds=now - self.submitted,
            logprobs=tuple(self.logprobs),
        )

    def score(self, scores: list[tuple[int, float]]) -> None:
        """From the generation loop, before it tells the next token: log probabilities in its place."""
        self.scores[len(self.tokens) :] = [scores]  # a step that is repeated writes its own again

    def score_text(self, end: int) -> tuple[Logprob, ...]:
        """The log probabilities of tokens up to `end` that have not been told yet, with their texts."""
        told = len(self.logprobs)
        for at in range(told, min(end, len(self.scores))):
            after = self.tokens[:at][-1:] or self.prompt[-1:]
            ids, values = zip(*self.scores[at])
            own, *top = map(Logprob, self.text.of_tokens(ids, after), values)
            last = self.logprobs[-1] if self.logprobs else Logprob("", 0.0)
            self.logprobs.append(own._replace(offset=last.offset + len(last.text), top=tuple(top)))
        return tuple(self.logprobs[told:])


class RequestTable:
    """Requests of one engine. `changed` guards and announces every change; `eos` are tokens that end a text."""

    def __init__(self, max_waiting: int, max_batch: int, eos: Sequence[int], store: TaskStore | None) -> None:
        self.changed = threading.Condition()
        self.state: State = "new"
        self.waiting: deque[Run] = deque()
        self.running: dict[str, Run] = {}
        self.finished = self.generated = 0
        self.last_step = (0, 0)
        self.max_waiting, self.max_batch, self.eos = max_waiting, max_batch, list(eos)
        self.store, self.metrics = store, Metrics(self.changed, store)
        self._recent: deque[tuple[float, int]] = deque()
        self._durations: deque[float] = deque(maxlen=64)
        self._silent: set[str | None] = set()  # tasks that have answered nothing

    def enqueue(self, run: Run) -> None:
        """Let a request wait for its turn, or raise: see `Engine.submit`."""
        with self.changed:
            if self.state != "ready":
                raise NotServingError(f"the engine is {self.state}: it takes no new requests")
            waiting = len(self.waiting)
            if waiting >= self.max_waiting:  # a place is likely after recent durations, over those that run at once
                mean = sum(self._durations) / len(self._durations) if self._durations else 1.0
                raise QueueFullError(waiting, max(1.0, mean * waiting / self.max_batch))
            self.waiting.append(run)
            self.metrics.taken.inc()
            self.changed.notify_all()

    def cancel(self, id: str) -> None:
        """End a request at its reader's wish."""
        with self.changed:
            run = self.running.get(id) or next((run for run in self.waiting if run.generation.id == id), None)
            if run is not None:
                self.end(run, "cancelled")

    def end(
        self,
        run: Run,
        reason: FinishReason,
        error: str | ServingError | None = None,
        text: str = "",
        logprobs: tuple[Logprob, ...] = (),
    ) -> None:
        """Hand the last piece to the readers; the loop is told to drop the request (see `stepped`)."""
        with self.changed:
            if run.ended:
                return
            run.ended = True
            if run in self.waiting:
                self.waiting.remove(run)
                self.give_back(run.lease)
            now = time.perf_counter()
            completion = run.completion(reason, error, now)
            self.finished += 1
            self._durations.append(now - (run.started or run.submitted))
            self.metrics.ended(completion)
            run.generation.push(Piece(text, len(run.tokens), reason, logprobs), completion)
            self.changed.notify_all()
        silent = reason == "stop" and not completion.text.strip() and not run.text.stopped
        if silent and completion.task not in self._silent:
            self._silent.add(completion.task)
            name = "the base" if completion.task is None else f"task {completion.task!r}"
            log.warning("%s ended an answer without a text: is it asked as in training? (said once)", name)

    def end_all(self, reason: FinishReason, error: str, *, waiting: bool) -> None:
        """End all that runs, and what waits if asked to."""
        with self.changed:
            for run in [*self.running.values(), *(self.waiting if waiting else ())]:
                self.end(run, reason, error)

    def release(self, id: str) -> None:
        """Forget a request that no loop has, and give its lease back."""
        with self.changed:
            self.give_back(self.running.pop(id).lease)
            self.changed.notify_all()

    def give_back(self, lease: Lease | None) -> None:
        """Let a request's version of its task go."""
        if lease is not None and self.store is not None:
            self.store.release(lease)

    def release_all(self) -> None:
        """Forget all requests of a loop that is gone."""
        with self.changed:
            for id in list(self.running):
                self.release(id)

    def output(self, id: str, generated: Sequence[int], finished: bool, error: str | None) -> None:
        """From the generation loop: all tokens of a request so far, whether it has finished, or its failure."""
        run = self.running.get(id)
        if run is None or run.ended:
            return
        if error is not None:
            self.end(run, "error", error)
            return
        new = generated[len(run.tokens) :]
        last = finished and generated and generated[-1] in (*self.eos, *run.ends) and not run.row.sampling.ignore_eos
        now = time.perf_counter()
        if new and run.first is None:
            run.first = now
        run.tokens += new
        self._recent.append((now, len(new)))
        self.generated += len(new)
        try:
            text = run.text.feed(new) + (run.text.finish() if finished else "")
            logprobs = run.score_text(len(run.tokens) - bool(last))
        except Exception as failure:  # the decoder's own; no other request is concerned
            self.end(run, "error", f"the answer cannot be decoded: {failure}")
            return
        run.parts.append(text)
        if run.text.stopped:
            self.end(run, "stop", text=text, logprobs=logprobs)
        elif finished:
            self.end(run, "stop" if last else "length", text=text, logprobs=logprobs)
        else:
            run.generation.push(Piece(text, len(run.tokens), None, logprobs))

    def stepped(self, inside: set[str], tokens: int, requests: int) -> Iterable[str]:
        """From the generation loop, after an iteration: release what it has dropped, name what it must drop.

        `inside` are the requests it has; `tokens` and `requests` are of its batch, 0 if there was none.
        """
        if requests:
            self.last_step = (tokens, requests)
            self.metrics.batch_tokens.observe(tokens)
            self.metrics.batch_requests.observe(requests)
        with self.changed:
            for id in [id for id, run in self.running.items() if run.ended and id not in inside]:
                self.release(id)
            return [id for id in inside if id not in self.running or self.running[id].ended]

    def active(self) -> int:
        """Requests that run and have not ended."""
        with self.changed:
            return sum(not run.ended for run in self.running.values())

    def tokens_per_second(self) -> float:
        """Generated tokens per second, over the last two."""
        since = time.perf_counter() - WINDOW
        with self.changed:  # others ask, too
            while self._recent and self._recent[0][0] < since:
                self._recent.popleft()
        return sum(tokens for _, tokens in list(self._recent)) / WINDOW
