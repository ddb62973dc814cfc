"""Server-sent events: every piece of text is sent as soon as it is there, as `data: {...}`, and last `data: [DONE]`.

Each generation is read by an asynchronous task that writes its events itself, one at a time: a slow client slows no
other. Another such task watches the connection, since sending to a client that is gone raises nothing; when it closes,
everything is cancelled. The status is sent with the first event, so what fails later is an event with `error`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import aclosing

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..request import Piece
from .answer import FAILED, Json, Reply, cancel, failure, until_gone
from .errors import ApiError

log = logging.getLogger(__name__)
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A reply as a stream."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.reply, self.tokens = reply, [0] * len(reply.generations)
        self.failed: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, or until the client is gone."""

        async def watch() -> None:
            await until_gone(receive)
            tasks.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch)
                await self._write(send)
                tasks.cancel_scope.cancel()
        finally:
            cancel(self.reply.generations)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        one_at_a_time, reply = anyio.Lock(), self.reply

        async def write(index: int, choices: Sequence[Json]) -> None:
            events = b"".join(_event(reply.chunk(index, choice)) for choice in choices)
            if events:
                async with one_at_a_time:
                    await send({"type": "http.response.body", "body": events, "more_body": True})

        async def read(index: int) -> None:
            try:
                await write(index, reply.opening())
                async with aclosing(aiter(reply.generations[index])) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        self._note(index, piece)
                        await write(index, reply.parts(piece))
            except Exception as error:  # the status is sent: the client is told in the stream
                if not isinstance(error, ApiError):
                    log.exception("a stream failed")
                    error = ApiError(500, "the answer failed: the log of the server says why", code="generation_failed")
                self.failed = error
                readers.cancel_scope.cancel()

        async with anyio.create_task_group() as readers:
            for index in range(len(reply.generations)):
                readers.start_soon(read, index)
        await send({"type": "http.response.body", "body": self._closing() + DONE, "more_body": False})

    def _note(self, index: int, piece: Piece) -> None:
        """Count tokens; raise if the generation failed."""
        self.tokens[index] = piece.tokens
        if piece.finish_reason in FAILED:
            raise failure(self.reply.generations[index].result(timeout=1))

    def _closing(self) -> bytes:
        if self.failed is not None:
            return _event(self.failed.body)
        return _event(self.reply.last(self.tokens)) if self.reply.with_usage else b""


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
