"""The generations of one request live and die together.

In:   prompts, settings, and the connection of whoever asks.
Out:  generations, all or none; their completions, or the knowledge that nobody waits for them any more.
Who:  `replies` for whole answers, `stream` for streams.

If one is refused, those before it are cancelled; if one fails or the client goes away, all are. Submitting happens in a
thread: tokenising a megabyte takes a second, and the store may be reading a folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import anyio
from anyio.to_thread import run_sync
from starlette.types import Receive

from ..generation import Generation
from ..request import Completion, Sampling
from .config import Served
from .errors import ApiError


async def submit(served: Served, model: str, prompts: Sequence[Any], samplings: Sequence[Sampling]) -> list[Generation]:
    """Submit every prompt with every setting, or nothing.

    Args:
        served: the engine.
        model: the name of a task, or of the base.
        prompts: texts or lists of token ids.
        samplings: one per answer to each prompt.

    Returns:
        Generations in the order of the prompts, `len(samplings)` for each.

    Raises:
        ServingError: one is refused; those before it are cancelled.
        ApiError: more than the engine can ever hold.
    """
    wanted, most = len(prompts) * len(samplings), served.engine.config.max_waiting
    if wanted > most:
        raise ApiError(400, f"{wanted} answers in one request: this server queues at most {most}", code="invalid_value")
    taken: list[Generation] = []

    def all_of_them() -> None:
        for prompt in prompts:
            for sampling in samplings:
                taken.append(served.engine.submit(prompt, task=served.task_of(model), sampling=sampling))

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


async def until_gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def wait_all(generations: Sequence[Generation], receive: Receive) -> list[Completion] | None:
    """The completions in order; None if the client went away first.

    Raises:
        ApiError: one of them failed.
    """
    done: dict[int, Completion] = {}

    async def one(index: int, scope: anyio.CancelScope) -> None:
        done[index] = await generations[index].wait()
        if failure(done[index].finish_reason) is not None or len(done) == len(generations):
            scope.cancel()

    async def watch(scope: anyio.CancelScope) -> None:
        await until_gone(receive)
        scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        for index in range(len(generations)):
            group.start_soon(one, index, group.cancel_scope)
    for completion in done.values():
        if (error := failure(completion.finish_reason, completion.error)) is not None:
            raise error
    return [done[index] for index in range(len(generations))] if len(done) == len(generations) else None


def failure(reason: str | None, error: str | None = None) -> ApiError | None:
    """What the client is told of an answer that did not come to its end; None if it did, or goes on.

    Args:
        reason: why it ended.
        error: the engine's words.
    """
    if reason == "error":
        said = f"the answer failed: {error or 'the log of the server says why'}"
        return ApiError(500, said, code="generation_failed")
    if reason == "cancelled":
        return ApiError(503, "the server ended this answer before it was complete", code="cancelled")
    return None


def usage(generations: Sequence[Generation], choices: int, completion_tokens: Iterable[int]) -> dict[str, int]:
    """Numbers of tokens; a prompt counts once however many answers it has.

    Args:
        generations: in the order of the prompts, `choices` for each.
        choices: answers per prompt.
        completion_tokens: of each generation.
    """
    prompt, completion = sum(one.prompt_tokens for one in generations[::choices]), sum(completion_tokens)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
