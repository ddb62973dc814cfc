"""An engine without a model: it keeps the engine's contract, and answers with words at a pace and with faults as told.

In:   names of tasks; how long an answer is; how long a step takes; a gate that holds every step.
Out:  `FakeEngine`; `httpserver.running` puts a real HTTP server around it.
Who:  tests of the HTTP server; anything that needs a server whose answers are known and whose speed is not the point.

The answer to a prompt on task "movie" is "movie0 movie1 movie2 ...", one word a token; with `echo` the first word is
"movie read: " and the prompt. A prompt with the word "boom" fails after its first token. `hold()` stops all answers
where they are and `go()` lets them go on; `allowed` stops each at so many words. A test may change all while it runs.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alora_kernels.adapters.cards import TaskCard
from alora_kernels.serving import EngineConfig, Stats, TaskInfo
from alora_kernels.serving.errors import (
    AdapterRefusedError,
    NotServingError,
    QueueFullError,
    RequestError,
    UnknownTaskError,
)
from alora_kernels.serving.metrics import Metrics
from alora_kernels.serving.request import Completion, Generation, Piece, Sampling

VOCABULARY = 1000
BOOM = "boom"
CARDS = {
    "movie": TaskCard(
        "Review: {text}\nSentiment:", ("positive", "negative"), "Review: a warm, funny film.\nSentiment:"
    ),
    "news": TaskCard("News: {title}\n{text}\nSection:"),  # no words, no sample
}  # the others do not say


class FakeTokenizer:
    """One id per word. With a template, a chat becomes `<role> text ... <assistant>`."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        import jinja2

        assert tokenize is False and add_generation_prompt is True
        if [m["role"] for m in messages] == ["assistant"]:
            raise jinja2.TemplateError("a chat must begin with the user")
        return " ".join(f"<{m['role']}> {m['content']}" for m in messages) + " <assistant>"


class FakeStore:
    """Names only; a folder counts as an adapter if it holds adapter_config.json."""

    bytes_per_task, bytes_shared = 1000, 3000

    def __init__(self, names: Sequence[str], cards: dict[str, TaskCard] = CARDS) -> None:
        self.closed, self.cards = False, cards
        self.loads: list[dict[str, Any]] = []
        self.reading = threading.Event()  # cleared: a load takes until it is set
        self.reading.set()
        self._tasks = {name: self._info(name, 1, Path("/adapters")) for name in names}

    def _info(self, name: str, version: int, folder: Path) -> TaskInfo:
        return TaskInfo(name, version, folder, "device", 0, self.bytes_per_task, time.time(), self.cards.get(name))

    def tasks(self) -> list[TaskInfo]:
        return list(self._tasks.values())

    def names(self) -> list[str]:
        return list(self._tasks)

    def load(
        self, folder: Path, *, name: str | None = None, task: str | None = None, replace: bool = False
    ) -> list[TaskInfo]:
        self.loads.append({"folder": folder, "name": name, "task": task, "replace": replace})
        assert self.reading.wait(30)
        if not os.path.isfile(folder / "adapter_config.json"):  # False, not an error, where a path is too long
            raise AdapterRefusedError(f"{folder}: no adapter_config.json")
        name = name or folder.name
        if name in self._tasks and not replace:
            raise AdapterRefusedError(f"a task is called {name!r} already")
        version = self._tasks[name].version + 1 if name in self._tasks else 1
        self._tasks[name] = self._info(name, version, folder)
        return [self._tasks[name]]

    def unload(self, name: str) -> TaskInfo:
        if name not in self._tasks:
            raise UnknownTaskError(name, self.names())
        return self._tasks.pop(name)

    def close(self) -> None:
        self.closed = True


@dataclass
class _Run:
    generation: Generation
    prompt: list[int]
    sampling: Sampling
    said: str
    fails: bool
    words: int
    told: list[str] = field(default_factory=list)
    submitted: float = field(default_factory=time.perf_counter)


class FakeEngine:
    """See the module.

    Args:
        tasks: names besides the base.
        config: limits; max_context must be named.
        words: an answer has so many, unless max_tokens ends it earlier.
        delay: seconds a step takes; in each step every running request gets a word.
        chat_template: of the tokenizer; None: it has none.
        echo: an answer begins with the prompt.

    Attributes:
        faults: task -> what its submission raises, or "boom": it fails after its first token.
    """

    def __init__(
        self,
        tasks: Sequence[str] = ("movie", "spam"),
        config: EngineConfig | None = None,
        *,
        words: int = 4,
        delay: float = 0.0,
        chat_template: str | None = None,
        echo: bool = False,
    ) -> None:
        self.config = config or EngineConfig(max_batch=32, max_waiting=64, max_context=64)
        self.store, self.tokenizer, self.metrics = FakeStore(tasks), FakeTokenizer(chat_template), Metrics()
        self.words, self.delay, self.echo, self.allowed = words, delay, echo, 10**9
        self.faults: dict[str, Exception | str] = {}
        self.stats_asked = 0
        self.state = "new"
        self.submitted: list[tuple[Any, str | None, Sampling]] = []  # everything that was taken
        self.cancelled: set[str] = set()  # tasks of requests that were cancelled while they ran or waited
        self.refuse_next: list[Exception] = []  # submit raises these first, one each
        self._lock = threading.Condition()
        self._gate = threading.Event()
        self._gate.set()
        self._runs: dict[str, _Run] = {}  # in order of arrival: the first max_batch run, the others wait
        self._finished = self._generated = 0
        self._started = time.perf_counter()

    def start(self) -> FakeEngine:
        self.state = "ready"
        threading.Thread(target=self._loop, daemon=True).start()
        return self

    def __enter__(self) -> FakeEngine:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def close(self) -> None:
        if self.state == "ready":
            self.state = "draining"

    def drain(self, timeout: float | None = None) -> bool:
        self.close()
        with self._lock:
            return self._lock.wait_for(lambda: not self._runs, timeout)

    def stop(self) -> None:
        with self._lock:
            self.state = "stopped"
            for run in list(self._runs.values()):
                self._end(run, "error", "the engine was stopped")
            self._lock.notify_all()

    def hold(self) -> None:
        """No answer gets another word."""
        self._gate.clear()

    def go(self) -> None:
        """All go on."""
        self._gate.set()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return [sum(word.encode()) % VOCABULARY for word in text.split()]

    def submit(self, prompt: Any, task: str | None = None, sampling: Sampling | None = None) -> Generation:
        sampling = sampling or Sampling()
        if self.refuse_next:
            raise self.refuse_next.pop(0)
        fault = self.faults.get(task or "")
        if isinstance(fault, Exception):
            raise fault
        if task is not None and task not in self.store.names():
            raise UnknownTaskError(task, self.store.names())
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        context = self.config.max_context or 0
        if not ids:
            raise RequestError("the prompt is empty: give at least one token", "prompt")
        if len(ids) >= context:
            raise RequestError(f"the prompt has {len(ids)} tokens, the context {context}: shorten it", "prompt")
        if any(not 0 <= one < VOCABULARY for one in ids):
            raise RequestError(f"token id {max(ids)} is not in the vocabulary", "prompt")
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, context - len(ids)))
        fails = fault == BOOM or self.encode(BOOM)[0] in ids
        generation = Generation(uuid.uuid4().hex, task, len(ids), self._cancel)
        with self._lock:
            if self.state != "ready":
                raise NotServingError(f"the engine is {self.state}: it takes no new requests")
            waiting = len(self._runs) - self.config.max_batch
            if waiting >= self.config.max_waiting:
                raise QueueFullError(waiting, 2.5)
            self.submitted.append((prompt, task, sampling))
            self._runs[generation.id] = _Run(generation, ids, sampling, str(prompt), fails, self.words)
            self._lock.notify_all()
        return generation

    def stats(self) -> Stats:
        self.stats_asked += 1
        running = min(len(self._runs), self.config.max_batch)
        return Stats(
            state=self.state,  # type: ignore[arg-type]
            running=running,
            waiting=len(self._runs) - running,
            max_batch=self.config.max_batch,
            max_waiting=self.config.max_waiting,
            batch_rows=running,
            batch_requests=running,
            tokens_per_second=0.0,
            requests_finished=self._finished,
            tokens_generated=self._generated,
            tasks_resident=len(self.store.names()),
            tasks_known=len(self.store.names()),
            uptime=time.perf_counter() - self._started,
            cache_used=running / self.config.max_batch,
        )

    def idle(self, timeout: float = 60.0) -> bool:
        """Whether nothing runs, or will soon."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._runs, timeout)

    def _cancel(self, id: str) -> None:
        with self._lock:
            if id in self._runs:
                self.cancelled.add(self._runs[id].generation.task or "base")
                self._end(self._runs[id], "cancelled")

    def _loop(self) -> None:
        while self.state != "stopped":
            self._gate.wait(0.05)
            time.sleep(self.delay)
            with self._lock:
                self._lock.wait_for(lambda: bool(self._runs) or self.state == "stopped", 0.5)
                if self._gate.is_set():
                    for run in list(self._runs.values())[: self.config.max_batch]:
                        if len(run.told) < self.allowed:
                            self._step(run)

    def _step(self, run: _Run) -> None:
        if run.fails and run.told:
            return self._end(run, "error", "boom, as asked")
        if not run.words:
            return self._end(run, "stop")
        task = run.generation.task or "base"
        word = f"{task} read: {run.said} " if self.echo and not run.told else f"{task}{len(run.told)} "
        run.told.append(word)
        self._generated += 1
        full = len(run.told) >= run.sampling.max_tokens
        if full or (len(run.told) >= run.words and not run.sampling.ignore_eos):
            return self._end(run, "length" if full else "stop", text=word)
        run.generation.push(Piece(word, len(run.told)))
        return None

    def _end(self, run: _Run, reason: Any, error: str | None = None, text: str = "") -> None:
        if self._runs.pop(run.generation.id, None) is None:
            return
        self._finished += 1
        completion = Completion(
            run.generation.id,
            run.generation.task,
            "".join(run.told),
            tuple(range(len(run.told))),
            reason,
            len(run.prompt),
            error,
            seconds=time.perf_counter() - run.submitted,
        )
        self.metrics.ended(completion)
        run.generation.push(Piece(text, len(run.told), reason), completion)
        self._lock.notify_all()
