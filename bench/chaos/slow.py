"""Clients that never finish: slow, half-open and endless ones, some bytes or MiB each; the server must end them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from ..serving.load import HOST
from .arena import Arena, Found, Levels, noted
from .client import COMPLETIONS, Load, head

LATE = 20.0  # seconds beyond the server's limit after which an unfinished request is lost, were it still open
MOST = 4 << 20  # bytes that an endless client sends at most
Writer = asyncio.StreamWriter


async def unfinished(arena: Arena, acts: int) -> Found:
    """So many connections at once, of every kind, beside the load; refused is one that the server closed in time."""
    load, levels = arena.load(), Levels()
    slowest = 0.0
    for _ in range(2):
        async with load.running(arena.size.clients), asyncio.TaskGroup() as group:
            tasks = [group.create_task(_one(arena, load, KINDS[i % len(KINDS)])) for i in range(acts)]
        slowest = max(slowest, *(task.result() for task in tasks))
        levels += await arena.levels()
    found = await arena.found(load, levels)
    return noted(found, f"the last was closed after {slowest:.0f} s")


async def _one(arena: Arena, load: Load, kind: Kind) -> float:
    """Behave like that until the server closes; seconds until then."""
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, arena.server.port)
    sending = asyncio.create_task(_sent(kind, writer))
    try:
        async with asyncio.timeout(arena.size.request_timeout + LATE):
            while await reader.read(1 << 16):
                pass
        load.tally.add("refused")
    except OSError:
        load.tally.add("refused")
    except TimeoutError:
        load.tally.add("lost", f"{kind.__name__}: still open after {time.perf_counter() - begin:.0f} s")
    finally:
        sending.cancel()
        writer.transport.abort()
    return time.perf_counter() - begin


async def _sent(kind: Kind, writer: Writer) -> None:
    with suppress(OSError):
        await kind(writer)


async def silent(writer: Writer) -> None:
    """Says nothing."""


async def half(writer: Writer) -> None:
    """The half of a request's head."""
    writer.write(head(COMPLETIONS, 100)[:60])


async def dripping(writer: Writer) -> None:
    """A head, a byte now and then."""
    for byte in head(COMPLETIONS, 100, "X-Long: " + "x" * 10_000):
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.2)


async def short_body(writer: Writer) -> None:
    """Fewer bytes than announced."""
    writer.write(head(COMPLETIONS, 1000) + b'{"model"')


async def endless_head(writer: Writer) -> None:
    """Headers without end."""
    writer.write(head(COMPLETIONS, 100)[:-2])
    for i in range(MOST // 1000):
        writer.write(f"X-{i}: {'x' * 990}\r\n".encode())
        await writer.drain()


async def endless_body(writer: Writer) -> None:
    """A body in pieces, without end."""
    writer.write(head(COMPLETIONS, 0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
    for _ in range(MOST // 1024):
        writer.write(b"400\r\n" + b" " * 1024 + b"\r\n")
        await writer.drain()


Kind = Callable[[Writer], Awaitable[None]]
KINDS: tuple[Kind, ...] = (silent, half, dripping, short_body, endless_head, endless_body)
