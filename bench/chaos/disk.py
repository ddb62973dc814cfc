"""Attacks through files: rewritten while they are read, damaged, a disk that is full, rows on the disk removed."""

from __future__ import annotations

import asyncio
import json
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import psutil

from alora_kernels.tuner.config import CONFIG, WEIGHTS

from .arena import Arena, Found, noted
from .client import Load
from .versions import UNSUMMED

ROOM = "8m"  # of the file system that is filled
MOST = 40  # loads after which a disk should be full
SPARSE = 1 << 33  # bytes that a file claims to have; it takes a few KiB of the disk


async def rewritten(arena: Arena, acts: int) -> Found:
    """Folders written anew in place, to the same and to other sizes, while they are loaded; half have no sums."""
    versions, written = arena.versions, arena.store.parent / "written"
    contents = {}
    for task in range(arena.size.changing):
        for version in (task, versions.second(task)):
            for pad in (0, 700):
                for sums in ({}, UNSUMMED):
                    folder = versions.write(written / "new", version, pad="x" * pad, **sums)
                    contents[version, pad, bool(sums)] = (folder / WEIGHTS).read_bytes()
                    shutil.rmtree(folder)
        versions.write(written / versions.name(task), task)

    async def rewrite(load: Load) -> None:
        task = load.draw.randrange(arena.size.changing)
        name, both = versions.name(task), (task, versions.second(task))
        before = set(versions.live[name])
        for version in both:
            versions.may(task, version)
        content = contents[load.draw.choice(both), load.draw.choice((0, 700)), load.draw.random() < 0.5]
        loading = asyncio.create_task(arena.put(written / name, name, replace=True))
        await asyncio.sleep(load.draw.uniform(0.0, 0.04))
        await asyncio.to_thread(_in_place, written / name / WEIGHTS, content)
        heard = await loading
        versions.now(task, *(both if heard.status == 200 else before))
        kind = {200: "right", 400: "refused"}.get(heard.status, "lost")
        load.tally.add(kind, f"{heard.status} {heard.text}" if kind == "lost" else "")
        for prompt in versions.prompts[task]:
            await load.judged(task, prompt, stream=False)

    found = await arena.storm(acts, rewrite)
    await arena.reset()
    return found


def _in_place(file: Path, content: bytes) -> None:
    """As `cp` does, in pieces."""
    with file.open("r+b", buffering=0) as out:
        for at in range(0, len(content), 16384):
            out.write(content[at : at + 16384])
            time.sleep(0.001)
        out.truncate(len(content))


async def damaged(arena: Arena, acts: int) -> Found:
    """Folders with flipped bits, cut short, or sparse: refused, or they answer as if nothing had been."""
    folder = arena.store.parent / "damaged"

    async def damage(load: Load) -> None:
        version = load.draw.randrange(arena.size.changing)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(arena.store / str(version), folder)
        _damage(folder, load.draw)
        heard = await arena.put(folder, name := arena.versions.name(version), replace=True)
        if heard.status == 200:  # the version that was there, or nobody sees a difference
            await load.judged(version, load.draw.choice(arena.versions.prompts[version]), stream=False)
            await arena.change(load, version, version)
        elif heard.status < 500:
            load.tally.add("refused")
        else:
            load.tally.add("lost", f"{name}: {heard.status} {heard.text}")

    return await arena.storm(acts, damage)


def _damage(folder: Path, draw: Random) -> None:
    weights, config = folder / WEIGHTS, folder / CONFIG
    kind = draw.choice(("bit", "bit", "header", "config", "cut", "sparse", "empty"))
    if kind in ("bit", "header", "config"):
        file = config if kind == "config" else weights
        content = bytearray(file.read_bytes())
        length = len(content) if kind != "header" else 8 + int.from_bytes(content[:8], "little")
        content[draw.randrange(length)] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    elif kind == "sparse":
        name = "base_model.model.model.layers.0.self_attn.q_proj.asymlora_A.weight"
        shape = [1, 4, SPARSE // 16]
        header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, SPARSE]}}).encode()
        with weights.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            out.truncate(8 + len(header) + SPARSE)
    else:
        weights.write_bytes(weights.read_bytes()[: draw.randrange(1, 2000)] if kind == "cut" else b"")


async def spill_removed(arena: Arena, acts: int) -> Found:
    """Somebody cleans temporary folders: tasks whose rows lay there are read from their folders again."""

    async def remove(load: Load) -> None:
        if not (folders := arena.server.spilled()):
            load.tally.add("lost", "no rows are on the disk, so there is nothing to remove")
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        await load.all_tasks()

    return await arena.storm(acts, remove)


async def full_disk(arena: Arena, acts: int) -> Found:
    """Loads until no room is left for rows: that one is refused with 507, tasks go on; with room it is loaded."""
    home = arena.server.home / "tmp"

    async def fill(load: Load) -> None:
        loaded: list[str] = []
        with _full(home, arena.server.process.pid):
            for name in (f"full-{i}" for i in range(MOST)):
                if (heard := await arena.put(arena.store / "0", name)).status != 200:
                    break
                loaded.append(name)  # it found a place in memory
            load.tally.expect(507, heard, "refused")
            await load.all_tasks()
        heard = await arena.put(arena.store / "0", "room")
        load.tally.expect(200, heard)
        for gone in ["room"] * (heard.status == 200) + loaded:
            await arena.drop(gone)

    found = await arena.storm(acts, fill)
    how = f"a tmpfs of {ROOM}" if home.is_mount() else "a limit on the size of files"
    return noted(found, how)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """The folder as a small file system of its own, where that is allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", folder], capture_output=True
        ).returncode
    except OSError:
        mounted = False
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], capture_output=True)


@contextmanager
def _full(folder: Path, pid: int) -> Iterator[None]:
    """The small file system filled; else a process that may write no file longer than a page."""
    filler = folder / "filler"
    if not folder.is_mount():
        before = psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE)
        psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (resource.getpagesize(), before[1]))
        try:
            yield
        finally:
            psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, before)
        return
    with suppress(OSError), filler.open("wb", buffering=0) as out:
        while out.write(bytes(4096)):
            pass
    try:
        yield
    finally:
        filler.unlink()
