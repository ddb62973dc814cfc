"""Tasks in versions: their folders, what each version answers, and which of them may be answering now.

A version is a row of `Adapters`. What is right was computed before the server ran, by stock PEFT, one request at a
time; prompts at which two tokens are as good as equal are left out. Whoever changes a task says so before (`may`) and
after (`now`); a request's answer must be that of a version that could answer while it was on its way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from ..serving.adapters import TIE, Adapters, Truth
from ..serving.load import Request

GONE = -1  # among the versions that may answer: none, so that 404 is right
UNSUMMED = {"sha256": "{}"}  # metadata of a file whose writer told no sums
LENGTH = 12  # tokens of a prompt
Prompt = tuple[int, ...]


@dataclass
class Versions:
    """`tasks` tasks, of which the first `changing` have a second version."""

    adapters: Adapters
    truth: Truth
    tokenizer: Any
    folder: Path
    tasks: int
    changing: int
    new_tokens: int
    answers: dict[tuple[int, Prompt], str] = field(init=False, default_factory=dict)
    prompts: dict[int, list[Prompt]] = field(init=False, default_factory=dict)
    live: dict[str, set[int]] = field(init=False, default_factory=dict)
    _watched: dict[str, list[set[int]]] = field(init=False, default_factory=dict)

    def make(self, draw: Random, prompts: int) -> None:
        """Write every task's folder, and compute what each version answers to so many prompts."""
        for task in range(self.tasks):
            self.live[self.name(task)] = {task}
            self.write(self.home(task), task)
            versions = [task, self.second(task)] if task < self.changing else [task]
            for start in (draw.randrange(3, 5000) for _ in count()):
                prompt = tuple(range(start, start + LENGTH))
                found = [self.truth.answer(Request(version, prompt), self.new_tokens) for version in versions]
                texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens, _ in found]
                if min(min(margins) for _, margins in found) > TIE and len(set(texts)) == len(texts):
                    self.prompts.setdefault(task, []).append(prompt)
                    self.answers |= {(version, prompt): text for version, text in zip(versions, texts, strict=True)}
                if len(self.prompts.get(task, [])) == prompts:
                    break

    def name(self, task: int) -> str:
        return self.adapters.name(task)

    def second(self, task: int) -> int:
        """The other version of a task that changes."""
        return self.tasks + task

    def home(self, task: int) -> Path:
        """The folder that the server loads the task from."""
        return self.folder / self.name(task)

    def write(self, folder: Path, version: int, **metadata: str) -> Path:
        """An adapter folder of one version, under the name of its task."""
        return self.adapters.write(folder, {self.name(version % self.tasks): version}, **metadata)

    def may(self, task: int, version: int) -> None:
        """From now on this version may answer, beside those that may already."""
        name = self.name(task)
        for allowed in [self.live[name], *self._watched.get(name, [])]:
            allowed.add(version)

    def now(self, task: int, *versions: int) -> None:
        """From now on only these may answer requests that come."""
        for version in versions:
            self.may(task, version)
        self.live[self.name(task)] = set(versions)

    @contextmanager
    def watched(self, task: int) -> Iterator[set[int]]:
        """The versions that may answer a request that is on its way during the block."""
        allowed, watching = set(self.live[self.name(task)]), self._watched.setdefault(self.name(task), [])
        watching.append(allowed)
        try:
            yield allowed
        finally:
            watching[:] = [other for other in watching if other is not allowed]

    def right(self, allowed: set[int], prompt: Prompt, text: str) -> bool:
        return any(self.answers[version, prompt] == text for version in allowed if version != GONE)
