"""Where attacks on a server happen: it, its tasks, the load beside the attack, what is measured before and after."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from alora_kernels.data import load_model
from alora_kernels.recipes.display import quiet

from ..serving.adapters import Adapters, Truth, sharing
from .client import LOAD, UNLOAD, Heard, Load, ask
from .server import TAKEN, Server
from .versions import GONE, Versions

MODEL = "tiny-random"


@dataclass(frozen=True)
class Size:
    """Of a whole run."""

    tasks: int
    changing: int  # of them have a second version
    prompts: int  # per task
    new_tokens: int
    clients: int  # of the load beside an attack
    settle: float  # seconds in which what has ended is let go of; 0 measures nothing
    request_timeout: float  # of the server, after which it ends a request that is not there as a whole


LONG, QUICK = Size(64, 8, 2, 16, 6, 3.0, 30.0), Size(20, 4, 1, 6, 2, 0.0, 2.0)
Levels = list[tuple[float, int]]  # MB and descriptors


@dataclass
class Arena:
    """One server for all attacks, and its tasks; `store` has a folder of every version."""

    server: Server
    versions: Versions
    store: Path
    draw: Random
    size: Size

    def load(self) -> Load:
        return Load(self.server, self.versions, self.draw)

    async def put(self, folder: Path, name: str, *, replace: bool = False) -> Heard:
        """Ask the server to load a folder's task under a name."""
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": replace}
        return await ask(self.server.port, LOAD, body)

    async def drop(self, name: str) -> Heard:
        """Ask it to unload one."""
        return await ask(self.server.port, UNLOAD, {"lora_name": name})

    async def change(self, load: Load, task: int, version: int) -> None:
        """Make a version of a task, or GONE, the one that answers; a fault if the server refuses."""
        name = self.versions.name(task)
        self.versions.may(task, version)
        if version == GONE:
            heard = await self.drop(name)
        else:
            heard = await self.put(self.store / str(version), name, replace=True)
        if heard.status != 200:
            load.tally.add("lost", f"{name}, version {version}: {heard.status} {heard.text}")
        self.versions.now(task, version)

    async def reset(self) -> None:
        """All tasks as in the beginning."""
        for task in range(self.size.changing):
            await self.change(self.load(), task, task)

    async def storm(self, acts: int, act: Callable[[Load], Awaitable[object]], clients: int | None = None) -> Found:
        """The act again and again beside the load, a request after each unless a number of clients is said.

        Levels are read after a quarter, when all has been touched, and at the end, each time when it is quiet.
        """
        load, levels = self.load(), Levels()
        first = max(1, acts // 4)
        for count in (first, acts - first):
            async with load.running(self.size.clients if clients is None else clients):
                for _ in range(count):
                    await act(load)
                    if clients is None:
                        await load.judged(*load.pick(), stream=True)
            levels += await self.levels()
        return await self.found(load, levels)

    async def levels(self) -> Levels:
        """What the server holds when it is quiet; nothing in a run that is too short to tell."""
        await asyncio.sleep(self.size.settle)
        return [self.server.levels()] if self.size.settle else []

    async def found(self, load: Load, levels: Levels) -> Found:
        """The columns of a row."""
        unaccounted = await self.server.unaccounted()
        notes = [f"{load.tally.counts['later']:,} were told to come later"] if load.tally.counts["later"] else []
        if unaccounted is None:
            notes.append(f"{TAKEN} is not counted here, so taken = ended + running + waiting was not checked")
        elif unaccounted:
            load.tally.add("lost", f"taken - ended - running - waiting = {unaccounted}")
        measured = [float(level) for pair in zip(*levels, strict=True) for level in pair]
        note = "; ".join(notes + load.tally.faults)
        return load.tally.ended | dict(zip(MEASURED, measured, strict=False)) | {"note": note}


Found = dict[str, Any]  # columns of a row


def noted(found: Found, said: str) -> Found:
    """What was found, with something more said about it, before the rest."""
    return found | {"note": "; ".join(filter(None, (said, found["note"])))}


MEASURED = ("mb_before", "mb_after", "files_before", "files_after")


@contextmanager
def arena(folder: Path, size: Size, seed: int, show: Callable[[str], None]) -> Iterator[Arena]:
    """A server with its tasks, answers computed before; the process ends with the block."""
    quiet()
    show("answers of every version, by stock PEFT")
    draw, root = Random(seed), folder / "adapters"
    base, tokenizer = load_model(MODEL)
    adapters = Adapters(base, size.tasks + size.changing, r=4)
    truth = Truth(sharing(base), adapters)
    versions = Versions(adapters, truth, tokenizer, root / "home", size.tasks, size.changing, size.new_tokens)
    versions.make(draw, size.prompts)
    store = root / "store"
    for version in range(size.tasks + size.changing):
        if version < size.changing or version >= size.tasks:
            versions.write(store / str(version), version)
    folders = [versions.home(task) for task in range(size.tasks)]
    server = Server(MODEL, folders, root, folder / "server", size.request_timeout)
    show("starting the server")
    server.start()
    try:
        yield Arena(server, versions, store, draw, size)
    finally:
        server.process.stop()
        shutil.rmtree(root, ignore_errors=True)
