"""One HTTP request becomes several generations, and their texts one reply.

If one is refused, those before it are cancelled; if one fails or the client goes away, all are. Submitting happens in a
thread: tokenising a megabyte takes a second, and the store may be moving a task's rows.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
from anyio.to_thread import run_sync
from starlette.responses import JSONResponse, Response
from starlette.types import Receive

from ..request import Completion, Generation, Piece, Sampling
from .errors import ApiError

if TYPE_CHECKING:
    from ..engine import Engine

CLIENT_GONE = 499  # nginx' word for it; nobody reads it
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
        cancel(taken)
        raise
    return taken


def cancel(generations: Iterable[Generation]) -> None:
    """End what still runs."""
    for generation in generations:
        generation.cancel()


@dataclass(frozen=True)
class Reply:
    """A reply in OpenAI's shape; each kind says how its choices look."""

    prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    model: str  # as asked
    generations: Sequence[Generation]  # in the order of the prompts; their places are the choices' indices
    choices: int  # answers per prompt
    with_usage: bool = False  # whether a stream's events have the key `usage`
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def choice(self, completion: Completion) -> Json:
        """The choice of a finished answer."""
        raise NotImplementedError

    def opening(self) -> list[Json]:
        """Choices that a stream begins with."""
        return []

    def parts(self, piece: Piece) -> list[Json]:
        """Choices that a stream has for a piece."""
        raise NotImplementedError

    def whole(self, completions: Sequence[Completion]) -> Json:
        """The reply at once; completions are in the order of the generations."""
        choices = [{"index": index, **self.choice(completion)} for index, completion in enumerate(completions)]
        usage = self.usage(completion.completion_tokens for completion in completions)
        return {**self._start(self.object), "choices": choices, "usage": usage}

    def chunk(self, index: int, choice: Json) -> Json:
        """One event of a stream."""
        chunk = {**self._start(self.chunk_object), "choices": [{"index": index, **choice}]}
        return chunk | {"usage": None} if self.with_usage else chunk

    def last(self, tokens: Iterable[int]) -> Json:
        """The event with the usage, which has no choice."""
        return {**self._start(self.chunk_object), "choices": [], "usage": self.usage(tokens)}

    def usage(self, tokens: Iterable[int]) -> dict[str, int]:
        """Token counts from those of each generation; a prompt counts once however many answers it has."""
        prompt, completion = sum(one.prompt_tokens for one in self.generations[:: self.choices]), sum(tokens)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _start(self, kind: str) -> Json:
        return {"id": f"{self.prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


async def answer(reply: Reply, receive: Receive) -> Response:
    """Wait for the end of all answers, or of the connection; an ApiError if a generation failed."""
    try:
        completions = await _wait_all(reply.generations, receive)
    finally:
        cancel(reply.generations)
    return Response(status_code=CLIENT_GONE) if completions is None else JSONResponse(reply.whole(completions))


async def _wait_all(generations: Sequence[Generation], receive: Receive) -> list[Completion] | None:
    """The completions in order; None if the client went away first."""
    done: dict[int, Completion] = {}

    async def one(index: int, scope: anyio.CancelScope) -> None:
        done[index] = await generations[index].wait()
        if done[index].finish_reason in FAILED or len(done) == len(generations):
            scope.cancel()

    async def watch(scope: anyio.CancelScope) -> None:
        await until_gone(receive)
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        for index in range(len(generations)):
            group.start_soon(one, index, group.cancel_scope)
    for completion in done.values():
        if completion.finish_reason in FAILED:
            raise failure(completion)
    return [done[index] for index in range(len(generations))] if len(done) == len(generations) else None


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def failure(completion: Completion) -> ApiError:
    """What the client is told of an answer that did not come to its end."""
    if completion.finish_reason == "cancelled":
        return ApiError(503, "the server ended this answer before it was complete", code="cancelled")
    said = f"the answer failed: {completion.error or 'the log of the server says why'}"
    return ApiError(500, said, code="generation_failed")
