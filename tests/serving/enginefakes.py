"""The engine without a model: a loop of its own answers with words, at a pace and with faults as told.

Requests are checked, queued, cancelled and drained by the real `Engine` and `RequestTable`. The answer to a prompt on
task "movie" is "movie0 movie1 movie2 ...", one word a token; with `echo` the first word is "movie read: " and the
prompt. A prompt with the word "boom" fails after its first token. `hold()` stops all answers where they are and `go()`
lets them go on; `allowed` stops each at so many words. A test may change all while it runs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from alora_kernels.adapters.cards import TaskCard
from alora_kernels.serving import Engine, EngineConfig, Stats, TaskInfo
from alora_kernels.serving.request import AdapterRefusedError, Generation, Sampling, UnknownTaskError
from alora_kernels.serving.request_table import RequestTable, Run
from alora_kernels.serving.store import Lease

VOCABULARY = 1000
BOOM = "boom"
CARDS = {
    "movie": TaskCard(
        "Review: {text}\nSentiment:", ("positive", "negative"), "Review: a warm, funny film.\nSentiment:"
    ),
    "news": TaskCard("News: {text}\nSection:"),  # no words, no sample
}  # the others do not say


class FakeTokenizer:
    """An id per word of a prompt, ids above for words of answers. A chat becomes `<role> text ... <assistant>`."""

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template
        self.texts: dict[tuple[int, ...], str] = {}  # of prompts, by their ids
        self.words: list[str] = []  # of answers
        self.backend_tokenizer = SimpleNamespace(decode=self.decode)

    bos_token_id = None
    all_special_tokens, all_special_ids, added_tokens_decoder = (), (), {}

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [sum(word.encode()) % VOCABULARY for word in text.split()]
        self.texts[tuple(ids)] = text
        return {"input_ids": ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.words[id - VOCABULARY] if id >= VOCABULARY else "word " for id in ids)

    def token(self, word: str) -> int:
        self.words.append(word)
        return VOCABULARY + len(self.words) - 1

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, chat_template: str | None, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        import jinja2

        assert tokenize is False and add_generation_prompt is True
        if chat_template:
            return chat_template.format(*(message["content"] for message in messages))
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

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    def info(self, name: str) -> TaskInfo:
        if name not in self._tasks:
            raise UnknownTaskError(name, self.names())
        return self._tasks[name]

    def reserve(self, name: str) -> Lease:
        return Lease(name, self.info(name).version, self.info(name).card)

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


class NotingTable(RequestTable):
    """Remembers what was taken, and the tasks of requests that were cancelled while they ran or waited."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken: dict[str, Run] = {}
        self.cancelled: set[str] = set()

    def enqueue(self, run: Run) -> None:
        super().enqueue(run)
        self.taken[run.generation.id] = run

    def cancel(self, id: str) -> None:
        with self.changed:
            if not self.taken[id].ended:
                self.cancelled.add(self.taken[id].generation.task or "base")
            super().cancel(id)


class FakeEngine(Engine):
    """See the module. `max_context` of a config must be named."""

    def __init__(
        self,
        tasks: Sequence[str] = ("movie", "spam"),
        config: EngineConfig | None = None,
        *,
        words: int = 4,  # an answer has so many, unless max_tokens ends it earlier
        delay: float = 0.0,  # seconds a step takes; in each step every running request gets a word
        chat_template: str | None = None,
        echo: bool = False,  # an answer begins with the prompt
    ) -> None:
        self.config = config or EngineConfig(max_batch=32, max_waiting=64, max_context=64)
        self.store, self.tokenizer = FakeStore(tasks), FakeTokenizer(chat_template)
        self._vocabulary, self._tokenizing, self._admission = VOCABULARY, threading.Lock(), None
        self._table = NotingTable(self.config.max_waiting, self.config.max_batch, [], None)
        self.metrics = self._table.metrics
        self.words, self.delay, self.echo, self.allowed = words, delay, echo, 10**9
        self.faults: dict[str, Exception | str] = {}  # task -> what submit raises, or "boom": after its first token
        self.submitted: list[tuple[Any, str | None, Sampling]] = []  # prompt, task and settings of what was taken
        self.refuse_next: list[Exception] = []  # submit raises these first, one each
        self.stats_asked = 0
        self._gate, self._special = threading.Event(), {}
        self._gate.set()

    @property
    def cancelled(self) -> set[str]:
        """Tasks of requests that were cancelled while they ran or waited."""
        return self._table.cancelled

    def start(self) -> FakeEngine:
        self._table.state, self._started = "ready", time.perf_counter()
        threading.Thread(target=self._loop, daemon=True).start()
        return self

    def stop(self) -> None:
        with self._table.changed:
            self._table.state = "stopped"
            self._table.end_all("cancelled", "the engine was stopped", waiting=True)
            self._table.release_all()

    def hold(self) -> None:
        """No answer gets another word."""
        self._gate.clear()

    def go(self) -> None:
        """All go on."""
        self._gate.set()

    def submit(self, prompt: Any, task: str | None = None, sampling: Sampling | None = None) -> Generation:
        fault = self.refuse_next.pop(0) if self.refuse_next else self.faults.get(task or "")
        if isinstance(fault, Exception):
            raise fault
        generation = super().submit(prompt, task, sampling)
        self.submitted.append((prompt, task, self._table.taken[generation.id].row.sampling))
        return generation

    def stats(self) -> Stats:
        self.stats_asked += 1
        return super().stats()

    def idle(self, timeout: float = 60.0) -> bool:
        """Whether nothing runs, or will soon."""
        table = self._table
        with table.changed:
            return table.changed.wait_for(lambda: not table.running and not table.waiting, timeout)

    def _loop(self) -> None:
        table = self._table
        while self.state != "stopped":
            self._gate.wait(0.05)
            time.sleep(self.delay)
            with table.changed:
                table.changed.wait_for(lambda: table.waiting or table.running or self.state == "stopped", 0.5)
                while table.waiting and len(table.running) < table.max_batch:
                    run = table.waiting.popleft()
                    run.started = time.perf_counter()
                    table.running[run.generation.id] = run
                runs = [run for run in table.running.values() if self._gate.is_set() and not run.ended]
                for run in runs:
                    if len(run.tokens) < self.allowed:
                        self._step(run)
                table.stepped({id for id, run in table.running.items() if not run.ended}, len(runs), len(runs))

    def _step(self, run: Run) -> None:
        task, count = run.generation.task or "base", len(run.tokens)
        boom = self.faults.get(task) == BOOM or self.encode(BOOM)[0] in run.prompt
        if boom and count:
            return self._table.output(run.generation.id, run.tokens, False, "boom, as asked")
        said = self.tokenizer.texts.get(tuple(run.prompt), "")
        word = f"{task} read: {said} " if self.echo and not count else f"{task}{count} "
        full = count + 1 >= run.row.sampling.max_tokens and self.words
        over = count + 1 >= self.words and not run.row.sampling.ignore_eos and not full
        token = self.tokenizer.token(word if self.words else "")
        if over:
            self._table.eos.append(token)
        if (most := run.row.sampling.logprobs) is not None:
            run.score([(token, -0.5), *((self.tokenizer.token(f"other{n}"), -0.5 - n) for n in range(most))])
        return self._table.output(run.generation.id, [*run.tokens, token], bool(full or over), None)
