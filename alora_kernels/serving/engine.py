"""The engine: requests for any mix of tasks go in, text comes out, one batch serves them all.

In:   a base model with its tasks (`TaskStore`), prompts, and a task and settings for each.
Out:  a `Generation` per request; numbers for the operator (`Stats`, `Metrics`).
Who:  the HTTP server, the bench, and users in their own programs.

A request is checked here, waits in the `Book`, is given the slot of its task and a place in the batch by `Admission`,
and is answered by the generation loop (`TaskBatching`), which calls back into the book with tokens. Since a request
holds its task's slot until the loop has let go of it, a task can be replaced or unloaded while it answers.
"""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
import weakref
from collections.abc import Sequence
from types import TracebackType

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .admission import CHECK, Admission
from .batching import Callbacks, TaskBatching, cache_config
from .config import EngineConfig, State, Stats
from .errors import NotServingError, QueueFullError, RequestError, ServingError, UnknownTaskError
from .generation import Generation
from .metrics import Metrics
from .openmp import release_workers
from .request import Completion, Sampling
from .request_table import Book, Run
from .sampling import Row, random_numbers
from .store import TaskStore
from .text import TextStream, eos_tokens


class Engine:
    """Serves one base model and its tasks.

    Args:
        model: the base model that `store` put its layers into.
        tokenizer: of the base.
        store: the tasks; None serves the base alone.
        config: sizes.

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
        self.metrics = Metrics()
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[union-attr, arg-type]
        self._eos = eos_tokens(model, tokenizer)
        self._book = Book(self.config.max_waiting, self.config.max_batch, self._eos, store, self.metrics)
        self._tokenizing = threading.Lock()  # the backend refuses two threads at once
        self._started = time.perf_counter()
        self._admission: Admission | None = None
        self._add_gauges()

    def _add_gauges(self) -> None:
        book, store, gauge = self._book, self.store, self.metrics.gauge
        me = weakref.proxy(self)  # the loop holds the metrics, and must not hold a forgotten engine
        gauge("alora_requests_running", "requests in the batch", lambda: len(book.running))
        gauge("alora_requests_waiting", "requests that wait", lambda: len(book.waiting))
        gauge("alora_cache_used_ratio", "share of the KV cache in use", lambda: me._cache_used())
        if store is not None:
            gauge("alora_tasks_known", "tasks", lambda: me._task_counts()[1])
            gauge("alora_tasks_resident", "tasks whose rows are in the model", lambda: me._task_counts()[0])
            gauge("alora_bytes_per_task", "bytes of one task's rows", lambda: store.bytes_per_task)
            gauge("alora_bytes_shared", "bytes of the shared B", lambda: store.bytes_shared)

    # ------------------------------------------------------------------ life

    @property
    def state(self) -> State:
        """Where in its life the engine is: "new", "ready", "draining", "stopped" or "failed"."""
        return self._book.state

    def start(self) -> Engine:
        """Begin to serve.

        Raises:
            NotServingError: it was started before.
        """
        with self._book.changed:
            if self._book.state != "new":
                raise NotServingError(f"the engine is {self._book.state}: make a new one")
            self._book.state, self._started = "ready", time.perf_counter()
        config, book = self.config, self._book
        settings = cache_config(config.page_size, config.cache_tokens, config.batch_tokens, config.max_batch)
        callbacks = Callbacks(book.output, book.stepped)
        model = self.model

        def make_loop() -> TaskBatching:
            loop = TaskBatching(model, settings, book.running, callbacks)
            loop.start()
            return loop

        self._admission = Admission(book, self.store, make_loop, config.max_batch, self._eos, self.metrics)
        weakref.finalize(self, _stop, book, self._admission)  # a forgotten engine, or the end of the program
        release_workers()
        return self

    def close(self) -> None:
        """Refuse new requests from now on; those taken go on."""
        with self._book.changed:
            if self._book.state == "ready":
                self._book.state = "draining"

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests and wait for those that run or wait.

        Args:
            timeout: seconds; None waits as long as it takes.

        Returns:
            Whether all have ended.
        """
        self.close()
        book = self._book
        with book.changed:
            return book.changed.wait_for(lambda: not book.running and not book.waiting, timeout)

    def stop(self) -> None:
        """End at once: what runs or waits gets the finish reason "cancelled". Harmless if stopped."""
        if self._admission is None:
            self._book.state = "stopped"
        else:
            _stop(self._book, self._admission)

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    # -------------------------------------------------------------- requests

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: any text.
            special: with the tokens the tokenizer puts around a text, as for a raw prompt.
        """
        with self._tokenizing:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def submit(
        self, prompt: str | Sequence[int], task: str | None = None, sampling: Sampling | None = None
    ) -> Generation:
        """Take a request; does not wait for it.

        Args:
            prompt: a text, or token ids.
            task: a name the store knows; None is the base alone.
            sampling: how to choose tokens, and when to end. `max_tokens` is cut to what the context holds.

        Raises:
            UnknownTaskError: no such task.
            RequestError: an empty prompt, one as long as the context, or ids outside the vocabulary.
            QueueFullError: too many wait.
            NotServingError: the engine does not take requests now.
        """
        try:
            return self._submit(prompt, task, sampling or Sampling())
        except ServingError as error:
            self.metrics.refused.labels(type(error).__name__.removesuffix("Error")).inc()
            raise

    def _submit(self, prompt: str | Sequence[int], task: str | None, sampling: Sampling) -> Generation:
        if task is not None and (self.store is None or task not in self.store):
            raise UnknownTaskError(task, [] if self.store is None else self.store.names())
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        room = self._check_prompt(ids)
        generation = Generation(f"gen-{uuid.uuid4().hex[:24]}", task, len(ids), self._book.cancel)
        sampling = dataclasses.replace(sampling, max_tokens=min(sampling.max_tokens, room))
        row = Row(sampling, random_numbers(sampling.seed))
        self._book.enqueue(Run(generation, ids, sampling, row, TextStream(self.tokenizer, ids, sampling.stop)))
        return generation

    def _check_prompt(self, ids: list[int]) -> int:
        """How many tokens an answer may have."""
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
        prompts: Sequence[str | Sequence[int]],
        tasks: Sequence[str | None] | str | None = None,
        sampling: Sampling | None = None,
    ) -> list[Completion]:
        """Answer any number of prompts and wait; more than fit the queue are fed in as it empties.

        Args:
            prompts: texts or token ids.
            tasks: one for all, or one per prompt.
            sampling: for all.

        Returns:
            Completions in the order of the prompts.

        Raises:
            ValueError: as many tasks as prompts are needed.
            ServingError: see `submit`; requests taken before are cancelled.
        """
        names = [tasks] * len(prompts) if tasks is None or isinstance(tasks, str) else list(tasks)
        if len(names) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need as many tasks, got {len(names)}")
        taken: list[Generation] = []
        try:
            for prompt, task in zip(prompts, names, strict=True):
                while True:
                    try:
                        taken.append(self.submit(prompt, task, sampling))
                        break
                    except QueueFullError:
                        with self._book.changed:
                            self._book.changed.wait(CHECK)
        except BaseException:
            for generation in taken:
                generation.cancel()
            raise
        return [generation.result() for generation in taken]

    # --------------------------------------------------------------- numbers

    def stats(self) -> Stats:
        """The engine now."""
        book, (resident, known) = self._book, self._task_counts()
        running = book.active()
        rows, requests = book.last_step if running else (0, 0)
        return Stats(
            state=book.state,
            running=running,
            waiting=len(book.waiting),
            max_batch=self.config.max_batch,
            max_waiting=self.config.max_waiting,
            batch_rows=rows,
            batch_requests=requests,
            tokens_per_second=book.tokens_per_second(),
            requests_finished=book.finished,
            tokens_generated=book.generated,
            tasks_resident=resident,
            tasks_known=known,
            uptime=0.0 if book.state == "new" else time.perf_counter() - self._started,
            cache_used=self._cache_used(),
        )

    def _cache_used(self) -> float:
        return 0.0 if self._admission is None else self._admission.loop.cached_tokens / (self.config.cache_tokens or 1)

    def _task_counts(self) -> tuple[int, int]:
        tasks = self.store.tasks() if self.store is not None else []
        return sum(task.where == "device" for task in tasks), len(tasks)


def _stop(book: Book, admission: Admission) -> None:
    with book.changed:
        if book.state == "stopped":
            return
        book.state = "stopped"
        book.end_all("cancelled", "the engine was stopped", waiting=True)
        book.changed.notify_all()
    admission.stop()
