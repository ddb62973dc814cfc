"""One HTTP request becomes several generations, and their texts one reply: whole, or a stream of server-sent events.

If one is refused, those before it are cancelled; if one fails or the client goes away, all are. Submitting happens in a
thread: tokenising a megabyte takes a second, and the store may be moving a task's rows. In a stream each generation is
read by an asynchronous task that sends its events itself, one at a time: a slow client slows no other. The status is
sent with the first event, so what fails later is an event with `error`.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
from anyio.abc import TaskGroup
from anyio.to_thread import run_sync
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..request import Completion, Generation, Piece, Sampling
from .errors import ApiError, meaning

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger(__name__)
CLIENT_GONE = 499  # nginx' word for it; nobody reads it
DONE = b"data: [DONE]\n\n"
FAILED = ("error", "cancelled")
Json = dict[str, Any]


async def submit(
    engine: Engine, task: str | None, prompts: Sequence[Any], samplings: Sequence[Sampling]
) -> list[Generation]:
    """Submit every prompt with every setting, or nothing: `len(samplings)` generations for each prompt, in order."""
    wanted, most = len(prompts) * len(samplings), engine.config.max_waiting
    if wanted > most:
        raise ApiError(400, f"{wanted} answers in one request: this server queues at most {most}", code="invalid_value")
    taken: list[Generation] = []

    def all_of_them() -> None:
        for prompt in prompts:
            for sampling in samplings:
                taken.append(engine.submit(prompt, task=task, sampling=sampling))

    try:
        await run_sync(all_of_them)
    except BaseException:
        for generation in taken:
            generation.cancel()
        raise
    return taken


@dataclass(frozen=True)
class Reply:
    """A reply in OpenAI's shape; each kind says how its choices look."""

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]
    opening: ClassVar[Sequence[Json]] = ()  # choices that a stream begins with

    model: str  # as asked
    generations: Sequence[Generation]  # in the order of the prompts; their places are the choices' indices
    choices: int  # answers per prompt
    with_usage: bool = False  # whether a stream's events have the key `usage`
    scored: bool = False  # whether log probabilities were asked for
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def choice(self, completion: Completion) -> Json:
        """The choice of a finished answer."""
        raise NotImplementedError

    def parts(self, piece: Piece) -> list[Json]:
        """Choices that a stream has for a piece."""
        raise NotImplementedError

    def whole(self) -> Json:
        """The reply at once, when all have ended."""
        choices = [{"index": index, **self.choice(one.result(0))} for index, one in enumerate(self.generations)]
        return self._start(self.object, choices) | {"usage": self._usage()}

    def chunk(self, index: int, choice: Json) -> Json:
        """One event of a stream."""
        chunk = self._start(self.chunk_object, [{"index": index, **choice}])
        return chunk | {"usage": None} if self.with_usage else chunk

    def last(self) -> Json:
        """The event with the usage, which has no choice."""
        return self._start(self.chunk_object, []) | {"usage": self._usage()}

    def _start(self, kind: str, choices: list[Json]) -> Json:
        name = f"{self.prefix}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _usage(self) -> dict[str, int]:
        """Token counts; a prompt counts once however many answers it has."""
        prompt = sum(one.prompt_tokens for one in self.generations[:: self.choices])
        completion = sum(one.result(0).completion_tokens for one in self.generations)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@asynccontextmanager
async def _while_connected(generations: Sequence[Generation], receive: Receive) -> AsyncIterator[TaskGroup]:
    """Tasks that end when their scope is cancelled, as it is when the client goes away; all generations end with them.

    Sending to a client that is gone raises nothing, so one of the tasks waits for the end of the connection.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            yield tasks
    finally:
        for generation in generations:
            generation.cancel()


async def answer(reply: Reply, receive: Receive) -> Response:
    """Wait for the end of all answers, or of the connection; an ApiError if a generation failed."""
    ended: list[Completion] = []

    async def wait(generation: Generation) -> None:
        ended.append(await generation.wait())
        if ended[-1].finish_reason in FAILED or len(ended) == len(reply.generations):
            tasks.cancel_scope.cancel()

    async with _while_connected(reply.generations, receive) as tasks:
        for generation in reply.generations:
            tasks.start_soon(wait, generation)
    for completion in ended:
        if completion.finish_reason in FAILED:
            raise _failure(completion)
    gone = len(ended) < len(reply.generations)
    return Response(status_code=CLIENT_GONE) if gone else JSONResponse(reply.whole())


class EventStream(Response):
    """A reply as a stream: each piece of text as soon as it is there, as `data: {...}`, and last `data: [DONE]`."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write until the end, or until the client is gone."""
        async with _while_connected(self.reply.generations, receive) as tasks:
            await self._write(send)
            tasks.cancel_scope.cancel()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        one_at_a_time, reply, failures = anyio.Lock(), self.reply, list[ApiError]()

        async def write(index: int, choices: Sequence[Json]) -> None:
            events = b"".join(_event(reply.chunk(index, choice)) for choice in choices)
            if events:
                async with one_at_a_time:
                    await send({"type": "http.response.body", "body": events, "more_body": True})

        async def read(index: int, generation: Generation) -> None:
            try:
                await write(index, reply.opening)
                async with aclosing(aiter(generation)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        if piece.finish_reason in FAILED:
                            raise _failure(generation.result(0))
                        await write(index, reply.parts(piece))
            except Exception as error:  # the status is sent: the client is told in the stream
                if not isinstance(error, ApiError):
                    log.exception("a stream failed")
                    error = ApiError(500, "the answer failed: the log of the server says why", code="generation_failed")
                failures.append(error)
                readers.cancel_scope.cancel()

        async with anyio.create_task_group() as readers:
            for index, generation in enumerate(reply.generations):
                readers.start_soon(read, index, generation)
        closing = [failures[-1].body] if failures else [reply.last()] if reply.with_usage else []
        body = b"".join(map(_event, closing)) + DONE
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _event(content: Json) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _failure(completion: Completion) -> ApiError:
    """What the client is told of an answer that did not come to its end."""
    if completion.refusal is not None:
        return meaning(completion.refusal)
    if completion.finish_reason == "cancelled":
        return ApiError(503, "the server ended this answer before it was complete", code="cancelled")
    said = f"the answer failed: {completion.error or 'the log of the server says why'}"
    return ApiError(500, said, code="generation_failed")
