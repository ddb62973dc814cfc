"""Server-sent events: every piece of text leaves as soon as it is there.

In:   the generations of one request and the head its events repeat.
Out:  an ASGI response: `data: {...}` events, then `data: [DONE]`.
Who:  `replies.reply`, for requests with `stream`.

Each generation is read by a task of its own that writes its events itself, one at a time: a slow client slows its own
tasks only. Another task watches the connection, since sending to a client that is gone raises nothing; when it closes,
everything is cancelled. The status is out with the first event, so what fails later is an event with `error`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import aclosing

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..generation import Generation
from ..request import Piece
from . import group
from .errors import ApiError
from .shape import Head, Json

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A reply as a stream.

    Args:
        head: what every event repeats, and the shape of the choices.
        generations: read at the same time; their places are the choices' indices.
        choices: answers per prompt, for the numbers of tokens.
    """

    def __init__(self, head: Head, generations: Sequence[Generation], choices: int) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.head, self.generations, self.choices = head, generations, choices
        self.tokens = [0] * len(generations)
        self.failed: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, or until the client is gone."""

        async def watch() -> None:
            await group.until_gone(receive)
            tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                await self._write(send)
                tasks.cancel_scope.cancel()
        finally:
            group.cancel(self.generations)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        one_at_a_time = anyio.Lock()

        async def write(index: int, choices: Sequence[Json]) -> None:
            events = b"".join(_event(self.head.chunk(index, choice)) for choice in choices)
            if events:
                async with one_at_a_time:
                    await send({"type": "http.response.body", "body": events, "more_body": True})

        async def read(index: int) -> None:
            try:
                await write(index, self.head.shape.opening())
                async with aclosing(aiter(self.generations[index])) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        self._note(index, piece)
                        await write(index, self.head.shape.parts(piece))
            except Exception as error:  # the status is out: the client is told in the stream
                if not isinstance(error, ApiError):
                    log.exception("a stream failed")
                self.failed = error if isinstance(error, ApiError) else group.failure("error")
                readers.cancel_scope.cancel()

        async with anyio.create_task_group() as readers:
            for index in range(len(self.generations)):
                readers.start_soon(read, index)
        await send({"type": "http.response.body", "body": self._closing() + DONE, "more_body": False})

    def _note(self, index: int, piece: Piece) -> None:
        """Count tokens; a piece that ends in failure is an exception."""
        self.tokens[index] = piece.tokens
        if group.failure(piece.finish_reason) is not None:
            error = group.failure(piece.finish_reason, self.generations[index].result(timeout=1).error)
            assert error is not None
            raise error

    def _closing(self) -> bytes:
        if self.failed is not None:
            return _event(self.failed.body)
        if self.head.with_usage:
            return _event(self.head.last(group.usage(self.generations, self.choices, self.tokens)))
        return b""


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
