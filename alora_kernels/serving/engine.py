"""The engine: requests for any mix of tasks go in, text comes out, one batch serves them all.

A request is checked here, waits in the `RequestTable`, is given the slot of its task and a place in the batch by
`Admission`, and is answered by the generation loop (`TaskBatching`), which tells the table its tokens. A task can be
replaced or unloaded while it answers: a request holds its slot until the loop has dropped the request.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.asking import Prompt, Turns, answer_ends, prompt_of, special_tokens, turn_ends
from .batching import EngineConfig, TaskBatching
from .openmp import Threads, release_workers
from .request import (
    Completion,
    Generation,
    NotServingError,
    QueueFullError,
    RequestError,
    Sampling,
    ServingError,
    TaskReplacedError,
    UnknownTaskError,
)
from .request_table import RequestTable, Run, State
from .sampling import Row
from .store import TaskStore
from .text import TextStream

log = logging.getLogger("alora_kernels.serving")
CHECK = 0.5  # seconds between looks at the loop's health
MAX_DEATHS = 5  # in a row, with no request answered in between: the model itself is broken


@dataclass(frozen=True)
class Stats:
    """The state of an engine at one moment."""

    state: State
    running: int
    waiting: int
    max_batch: int
    max_waiting: int
    batch_rows: int  # tokens in the last step
    batch_requests: int
    tokens_per_second: float  # generated, over the last two seconds
    requests_finished: int  # since the start
    tokens_generated: int
    tasks_resident: int  # whose rows are in the model
    tasks_known: int
    uptime: float  # seconds
    cache_used: float  # share of the KV cache, 0 .. 1


class Engine:
    """Serves one base model and its tasks; without a `store`, which has put its layers into `model`, the base alone.

    Raises:
        ValueError: see `EngineConfig`; a tokenizer without a `tokenizers` backend.

    Example:
        >>> with Engine(model, tokenizer, TaskStore.open(model, [folder])) as engine:
        ...     print(engine.submit("The film was", task="movie").result().text)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: TaskStore | None = None,
        config: EngineConfig | None = None,
    ) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(
                f"{type(tokenizer).__name__} cannot decode in steps: load the fast tokenizer of this model"
            )
        self.model, self.tokenizer, self.store = model, tokenizer, store
        self.config = (config or EngineConfig()).resolved(model)
        self._special = special_tokens(tokenizer)
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[union-attr, arg-type]
        eos = answer_ends(model, tokenizer)
        self._table = RequestTable(self.config.max_waiting, self.config.max_batch, eos, store)
        self.metrics = self._table.metrics
        self._tokenizing = threading.Lock()  # the backend refuses two threads at once
        self._started = time.perf_counter()
        self._admission: Admission | None = None
        self._add_gauges()

    def _add_gauges(self) -> None:
        table, store, gauge = self._table, self.store, self.metrics.gauge
        me = weakref.proxy(self)  # the loop holds the metrics, and must not hold a forgotten engine
        gauge("alora_requests_running", "requests in the batch", table.active)
        gauge("alora_requests_waiting", "requests that wait", lambda: len(table.waiting))
        gauge("alora_cache_used_ratio", "share of the KV cache in use", lambda: me._cache_used())
        if store is not None:
            gauge("alora_tasks_known", "tasks", lambda: len(store.names()))
            gauge("alora_tasks_resident", "tasks whose rows are in the model", store.resident)
            gauge("alora_bytes_per_task", "bytes of one task's rows", lambda: store.bytes_per_task)
            gauge("alora_bytes_shared", "bytes of the shared B", lambda: store.bytes_shared)

    @property
    def state(self) -> State:
        """One of "new", "ready", "draining", "stopped" and "failed"."""
        return self._table.state

    def start(self) -> Engine:
        """Begin to serve; a NotServingError if it was started before, a ValueError as `TaskBatching`."""
        with self._table.changed:
            if self.state != "new":
                raise NotServingError(f"the engine is {self.state}: make a new one")
            self._table.state, self._started = "ready", time.perf_counter()
        make_loop = partial(TaskBatching, self.model, self.config, self._table, Threads(torch.get_num_threads()))
        try:
            self._admission = Admission(self._table, make_loop)
        except BaseException:
            self._table.state = "stopped"
            raise
        weakref.finalize(self, self._admission.stop)  # a forgotten engine, or the end of the program
        release_workers()
        return self

    def close(self) -> None:
        """Refuse new requests from now on; those taken go on."""
        with self._table.changed:
            if self.state == "ready":
                self._table.state = "draining"

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for those that run or wait, for `timeout` seconds at most; whether all ended."""
        self.close()
        table = self._table
        with table.changed:
            return table.changed.wait_for(lambda: not table.running and not table.waiting, timeout)

    def stop(self) -> None:
        """End at once: what runs or waits gets the finish reason "cancelled". Harmless if stopped."""
        if self._admission is None:
            self._table.state = "stopped"
        else:
            self._admission.stop()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def encode(self, text: str | Prompt) -> list[int]:
        """Token ids of a text, with the tokens the tokenizer puts around one, or of a prompt, as in training."""
        with self._tokenizing:
            if isinstance(text, Prompt):
                return text.ids(self.tokenizer)
            return list(self.tokenizer(text, add_special_tokens=True)["input_ids"])

    def prompt(self, asked: str | Turns, task: str | None = None) -> Prompt:
        """What a user's text, or the turns of a chat, become for a task, as it was asked in training.

        Raises:
            UnknownTaskError: no such task.
            RequestError: turns that have no place in the task's prompt, or no chat template; it says what to do.
        """
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        with self._refusals():
            card = None if task is None else self._store_with(task).info(task).card
            try:  # not under the lock: a template is a program
                made = prompt_of(self.tokenizer, turns, card, task="the base" if task is None else task)
                return dataclasses.replace(made, card=card)
            except ValueError as error:
                raise RequestError(str(error), "prompt" if isinstance(asked, str) else "messages") from None

    def _store_with(self, task: str) -> TaskStore:
        if self.store is None:
            raise UnknownTaskError(task, [])
        return self.store

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Count what is refused within."""
        try:
            yield
        except ServingError as error:
            self.metrics.refused.labels(type(error).__name__.removesuffix("Error")).inc()
            raise

    def submit(
        self, prompt: str | Sequence[int] | Prompt, task: str | None = None, sampling: Sampling | None = None
    ) -> Generation:
        """Take a request; does not wait for it.

        Args:
            prompt: a text, or token ids; or what `prompt` made of a user's text.
            task: a name the store knows, as it is now, whatever is loaded or unloaded while the request waits; None is
                the base alone.
            sampling: how to choose tokens, and when to end. `max_tokens` is cut to what the context holds.

        Raises:
            UnknownTaskError: no such task.
            TaskReplacedError: `prompt` was made for a version that is asked in another way than the one there is now.
            RequestError: an empty prompt, one as long as the context, or ids outside the vocabulary.
            QueueFullError: too many wait.
            NotServingError: the engine does not take requests now.
        """
        with self._refusals(), ExitStack() as undo:
            lease = None if task is None else self._store_with(task).reserve(task)
            undo.callback(self._table.give_back, lease)
            card = None if lease is None else lease.card
            if isinstance(prompt, Prompt) and prompt.card is not ... and prompt.card != card:
                raise TaskReplacedError(f"task {task!r} was replaced while its prompt was made: ask again")
            ids = self.encode(prompt) if isinstance(prompt, str | Prompt) else list(prompt)
            room = self._check_prompt(ids)
            sampling = sampling or Sampling()
            sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))
            generation = Generation(f"gen-{uuid.uuid4().hex[:24]}", task, len(ids), self._table.cancel)
            row = Row(sampling, random.Random(sampling.seed).random)
            spaced = isinstance(prompt, Prompt) and prompt.spaced
            text = TextStream(self.tokenizer, ids, sampling.stop, spaced=spaced)
            own = None if card is None else card.chat_template
            ends = turn_ends(self.tokenizer, self._special, own) if own else []
            self._table.enqueue(Run(generation, ids, row, text, ends, lease))
            undo.pop_all()
            return generation

    def _check_prompt(self, ids: list[int]) -> int:
        """Refuse a prompt that cannot be answered; how many tokens its answer may have."""
        context = self.config.max_context or 0
        if not ids:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        if len(ids) >= context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and prompt and answer together may have {context}: shorten it",
                "prompt",
            )
        wrong = [i for i in ids if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self._vocabulary]
        if wrong:
            raise RequestError(f"token id {wrong[0]!r} is not in the vocabulary 0 .. {self._vocabulary - 1}", "prompt")
        return context - len(ids)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Prompt],
        tasks: Sequence[str | None] | str | None = None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Answer any number of prompts and wait; more than fit the queue are fed in as it empties.

        Args:
            prompts: as in `submit`.
            tasks: one for all, or one per prompt; see `submit`.
            sampling: for all.

        Returns:
            In the order of the prompts.

        Raises:
            ValueError: as many tasks as prompts are needed.
            ServingError: see `submit`; requests taken before are cancelled.
        """
        names = [tasks] * len(prompts) if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many tasks, got {len(names)}")
        taken: list[Generation] = []
        try:
            while len(taken) < len(prompts):
                try:
                    taken.append(self.submit(prompts[len(taken)], names[len(taken)], sampling))
                except QueueFullError:
                    with self._table.changed:
                        self._table.changed.wait(CHECK)
        except BaseException:
            for generation in taken:
                generation.cancel()
            raise
        return [generation.result() for generation in taken]

    def stats(self) -> Stats:
        """The engine's state and counts now."""
        table, tasks = self._table, [] if self.store is None else self.store.tasks()
        running = table.active()
        rows, requests = table.last_step if running else (0, 0)
        return Stats(
            state=table.state,
            running=running,
            waiting=len(table.waiting),
            max_batch=self.config.max_batch,
            max_waiting=self.config.max_waiting,
            batch_rows=rows,
            batch_requests=requests,
            tokens_per_second=table.tokens_per_second(),
            requests_finished=table.finished,
            tokens_generated=table.generated,
            tasks_resident=sum(task.where == "device" for task in tasks),
            tasks_known=len(tasks),
            uptime=0.0 if table.state == "new" else time.perf_counter() - self._started,
            cache_used=self._cache_used(),
        )

    def _cache_used(self) -> float:
        cached = 0 if self._admission is None else self._admission.loop.cached_tokens
        return cached / (self.config.cache_tokens or 1)


class Admission:
    """From the queue into the batch: one thread leases slots, feeds the generation loop, and replaces it if it dies.

    Copying a task's rows in may read a file, so it happens here and not in the loop. Requests are taken strictly in
    order: when the first one's task finds no free slot, all wait until a request ends, so no task can be starved.
    """

    def __init__(self, table: RequestTable, make_loop: Callable[[], TaskBatching]) -> None:
        self._table, self._make_loop = table, make_loop
        self._deaths, self._answered_before = 0, 0
        self.loop = make_loop()
        self._thread = threading.Thread(target=self._run, name="alora-admission", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Cancel what runs or waits, then end the thread and the loop. Harmless if stopped."""
        table = self._table
        with table.changed:
            if table.state == "stopped":
                return
            table.state = "stopped"
            table.end_all("cancelled", "the engine was stopped", waiting=True)
            table.changed.notify_all()
        self._thread.join()
        self.loop.stop(block=True, hard_stop=True)
        table.release_all()

    def _run(self) -> None:
        table = self._table
        while table.state != "stopped":
            run = self._next()
            if not self.loop.is_running() and table.state in ("ready", "draining"):
                self._replace_loop()
            elif run is not None and not self._admit(run):
                with table.changed:
                    table.changed.wait(CHECK)  # every slot is at work: one is free when a request ends

    def _next(self) -> Run | None:
        """The first request that waits, as soon as the batch has a place; None after `CHECK` seconds without one."""
        table = self._table

        def room() -> bool:
            return bool(table.waiting) and len(table.running) < table.max_batch

        with table.changed:
            table.changed.wait_for(lambda: table.state == "stopped" or room(), CHECK)
            return table.waiting[0] if room() else None

    def _admit(self, run: Run) -> bool:
        """Put a request into the batch, or end it if its task is lost; False if there is no slot for it now."""
        table, lease = self._table, run.lease
        if lease is not None and table.store is not None:
            try:
                if not table.store.place(lease):
                    return False
            except ServingError as error:
                table.end(run, "error", error)
                return True
            except Exception as error:  # of memory, a device: the next request is waiting for this thread
                log.exception("the rows of task %r were not brought into the model", lease.name)
                table.end(run, "error", f"its task was not brought into the model: {error}")
                return True
        with table.changed:
            if run.ended:  # cancelled meanwhile
                return True
            run.started, table.running[run.generation.id] = time.perf_counter(), run  # before the loop asks for it
            if self.loop.add(run):
                table.waiting.remove(run)
            else:  # it has just died: the request waits for the next one
                del table.running[run.generation.id]
        return True

    def _replace_loop(self) -> None:
        """The loop has died: fail what it had and start another."""
        table, cause = self._table, self.loop.cause
        table.end_all("error", f"the generation loop died: {cause}", waiting=False)
        table.release_all()
        table.metrics.restarts.inc()
        answered = table.metrics.answered
        self._deaths = 1 if answered > self._answered_before else self._deaths + 1
        self._answered_before = answered
        if self._deaths > MAX_DEATHS:
            with table.changed:
                table.state = "failed"
                table.end_all("error", f"the generation loop keeps dying: {cause}", waiting=True)
            return
        self.loop = self._make_loop()
