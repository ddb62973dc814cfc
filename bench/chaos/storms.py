"""Attacks on a server under load that touch no file: clients that leave, tasks that change, signals, crowds, churn."""

from __future__ import annotations

import asyncio
import signal
import statistics
import time
from contextlib import suppress

from .arena import MEASURED, Arena, Found, Levels, noted
from .client import COMPLETIONS, Load, ask
from .versions import GONE

TOGETHER = 10  # clients that leave at once


async def disconnects(arena: Arena, acts: int) -> Found:
    """Clients that close in the middle of a stream, or before it begins."""

    async def leave(load: Load) -> None:
        body = load.body(*load.pick(), stream=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(load.draw.choice((0.002, 0.02, 5.0))):
                await ask(arena.server.port, COMPLETIONS, body, events=load.draw.randrange(1, 6))

    async def leave_together(load: Load) -> None:
        await asyncio.gather(*(leave(load) for _ in range(TOGETHER)))

    return await arena.storm(acts // TOGETHER, leave_together)


async def replaced(arena: Arena, acts: int) -> Found:
    """Tasks get another version, are unloaded and loaded again, while they are asked."""

    async def change(load: Load) -> None:
        task = load.draw.randrange(arena.size.changing)
        gone = arena.versions.live[arena.versions.name(task)] == {GONE}
        choices = (task, arena.versions.second(task), *[GONE] * (not gone))
        await arena.change(load, task, load.draw.choice(choices))

    found = await arena.storm(acts, change)
    await arena.reset()
    return found


async def stopped(arena: Arena, acts: int) -> Found:
    """SIGSTOP, and SIGCONT a moment later: clients wait, and nothing is lost."""

    async def stop(load: Load) -> None:
        arena.server.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(load.draw.uniform(0.05, 0.6))
        finally:
            arena.server.signal(signal.SIGCONT)
        await asyncio.sleep(0.1)

    return await arena.storm(acts, stop)


async def killed(arena: Arena, acts: int) -> Found:
    """SIGKILL, and a new server: clients ask again until they are answered, and every task is there."""
    seconds = []

    async def kill(load: Load) -> None:
        await asyncio.sleep(load.draw.uniform(0.0, 1.0))
        arena.server.kill()
        begin = time.perf_counter()
        await asyncio.to_thread(arena.server.start)
        task, prompt = load.pick()
        await load.judged(task, prompt, stream=False)
        seconds.append(time.perf_counter() - begin)
        await load.all_tasks()

    found = await arena.storm(acts, kill)
    first = f"from the start to the first right answer, {arena.size.tasks} tasks, {statistics.median(seconds):.1f} s"
    return noted(found, first) | dict.fromkeys(MEASURED)


async def streams(arena: Arena, acts: int) -> Found:
    """So many streams at once, most of which must wait for their turn or are told to come later."""
    load, levels = arena.load(), Levels()
    for _ in range(2):
        async with asyncio.TaskGroup() as group:
            for _ in range(acts):
                group.create_task(load.judged(*load.pick(), stream=True))
        levels += await arena.levels()
    return await arena.found(load, levels)


async def churned(arena: Arena, acts: int) -> Found:
    """A task is loaded and unloaded again, thousands of times."""

    async def churn(load: Load) -> None:
        version = load.draw.randrange(arena.size.changing)
        for heard in (await arena.put(arena.store / str(version), "churn"), await arena.drop("churn")):
            load.tally.expect(200, heard)

    found = await arena.storm(acts, churn, clients=1)
    if "mb_after" in found:
        each = 1e6 * (found["mb_after"] - found["mb_before"]) / (acts - max(1, acts // 4))
        found = noted(found, f"{each:+,.0f} bytes a load after the first quarter")
    return found
