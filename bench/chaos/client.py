"""Clients over bare sockets, which can also behave badly, and the load whose every answer is judged."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ..serving.load import HOST
from .server import Server
from .versions import GONE, Prompt, Versions

PATIENCE = 120.0  # seconds without an answer after which a request is lost
PAUSE = 0.2  # seconds until a client that was told to come later does
COMPLETIONS, CHAT, LOAD, UNLOAD = (
    "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
)  # fmt: skip


@dataclass
class Heard:
    """What came back: of a stream the texts of its events put together; `whole` if it ended as it should."""

    status: int = 0
    text: str = ""
    tokens: int = 0
    whole: bool = False
    later: float = PAUSE  # seconds after which to ask again


def head(path: str, length: int, *lines: str) -> bytes:
    """The start of a request with a body of so many bytes."""
    said = [f"POST {path} HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json", f"Content-Length: {length}"]
    return "\r\n".join([*said, "Connection: close", *lines, "", ""]).encode()


async def ask(port: int, path: str, body: Any, *, events: int | None = None) -> Heard:
    """One request on a connection of its own, which is cut off after so many events; OSError or ValueError if it broke.

    The server sends whole events in a piece, so the lines between them that give a piece's length need no reading.
    """
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(HOST, port, limit=1 << 22)
    try:
        writer.write(head(path, len(content)) + content)
        if not (line := await reader.readline()):
            raise ConnectionResetError("closed without an answer")
        heard, streamed = Heard(int(line.split()[1])), False
        while (line := await reader.readline()).strip():
            name, _, value = line.lower().partition(b":")
            streamed |= name == b"content-type" and value.strip().startswith(b"text/event-stream")
            heard.later = float(value) if name == b"retry-after" else heard.later
        if not streamed:
            heard.text = (await reader.read()).decode(errors="replace")
            return _whole(heard)
        async for line in reader:
            if line.startswith(b"data: "):
                _take(heard, line.removeprefix(b"data: ").strip())
                events = None if events is None else events - 1
            if events == 0 or heard.whole:
                return heard
        raise ConnectionResetError("cut short")
    finally:
        writer.transport.abort()


def _whole(heard: Heard) -> Heard:
    """A reply in one piece; of an answer, its text and the number of its tokens."""
    if heard.status == 200 and heard.text.startswith("{"):
        said = json.loads(heard.text)
        heard.text, heard.tokens = said["choices"][0].get("text", ""), said["usage"]["completion_tokens"]
    heard.whole = True
    return heard


def _take(heard: Heard, event: bytes) -> None:
    if event == b"[DONE]":
        heard.whole = True
        return
    said = json.loads(event)
    if "error" in said:
        raise ValueError(f"an error in a stream: {said['error']}")
    heard.text += "".join(choice.get("text", "") for choice in said["choices"])
    heard.tokens = (said.get("usage") or {}).get("completion_tokens", heard.tokens)


@dataclass
class Tally:
    """What became of requests; the first few faults in words."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, kind: str, why: str = "") -> None:
        self.counts[kind] += 1
        if why and len(self.faults) < 5:
            self.faults.append(f"{kind}: {why[:200]}")

    def expect(self, status: int, heard: Heard, kind: str = "right") -> None:
        """Count an answer as of this kind if it has the status that it must have, else as lost."""
        self.add(*(kind,) if heard.status == status else ("lost", f"{heard.status} {heard.text}"))

    @property
    def ended(self) -> dict[str, int]:
        """Columns of a row."""
        c = self.counts
        ended = {"survived": c["right"] + c["refused"], "refused": c["refused"], "lost": c["lost"], "wrong": c["wrong"]}
        return {"tried": ended["survived"] + ended["lost"] + ended["wrong"], **ended}


@dataclass
class Load:
    """Requests for random tasks; half of them are streams."""

    server: Server
    versions: Versions
    draw: Random
    tally: Tally = field(default_factory=Tally)

    async def judged(self, task: int, prompt: Prompt, stream: bool) -> None:
        """One request until it has ended, asked again when told to come later or when the server was killed."""
        body = self.body(task, prompt, stream)
        with self.versions.watched(task) as allowed:
            try:
                async with asyncio.timeout(PATIENCE):
                    while True:
                        lives = self.server.lives
                        try:
                            heard = await ask(self.server.port, COMPLETIONS, body)
                        except (OSError, ValueError) as error:
                            if not self.server.away and self.server.lives == lives:
                                return self.tally.add("lost", f"{type(error).__name__}: {error}")
                            heard = Heard(429)  # killed: to be asked again
                        if heard.status != 429:
                            break
                        self.tally.counts["later"] += 1
                        await asyncio.sleep(heard.later)
            except TimeoutError:
                return self.tally.add("lost", f"no answer in {PATIENCE:.0f} s")
        self._judge(heard, allowed, task, prompt)

    def _judge(self, heard: Heard, allowed: set[int], task: int, prompt: Prompt) -> None:
        if heard.status == 404 and GONE in allowed:
            return self.tally.add("refused")
        if heard.status != 200 or not heard.whole:
            return self.tally.add("lost", f"{heard.status} {heard.text}" if heard.status != 200 else "cut short")
        if heard.tokens == self.versions.new_tokens and self.versions.right(allowed, prompt, heard.text):
            return self.tally.add("right")
        self.tally.add("wrong", f"task {task}, of versions {sorted(allowed)}: {heard.text!r}")

    def body(self, task: int, prompt: Prompt, stream: bool) -> dict[str, Any]:
        """Greedy, of a fixed length."""
        told = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        fixed = {"max_tokens": self.versions.new_tokens, "temperature": 0, "ignore_eos": True}
        return {"model": self.versions.name(task), "prompt": list(prompt), **fixed, **told}

    def pick(self) -> tuple[int, Prompt]:
        """A task, every second one of those that change, and a prompt."""
        few = self.draw.random() < 0.5
        task = self.draw.randrange(self.versions.changing if few else self.versions.tasks)
        return task, self.draw.choice(self.versions.prompts[task])

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[None]:
        """So many clients, one request after the other each, until the end of the block and of what they asked."""
        over = asyncio.Event()

        async def client() -> None:
            while not over.is_set() and not self.server.ended:
                await self.judged(*self.pick(), stream=self.draw.random() < 0.5)

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(client())
            try:
                yield
            finally:
                over.set()

    async def all_tasks(self) -> None:
        """Ask every task once, at once."""
        async with asyncio.TaskGroup() as group:
            for task in range(self.versions.tasks):
                prompt = self.draw.choice(self.versions.prompts[task])
                group.create_task(self.judged(task, prompt, stream=False))
