"""One request becomes several generations, and their texts one reply: whole, or as a stream.

In:   a checked request, its prompts, and the shape its reply has (`completions` and `chat` give theirs).
Out:  a JSON response, or a `stream.EventStream`.
Who:  the two routes that answer.

A stream's status leaves with its first event, so everything that can be refused is refused before there is one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from . import group
from .config import Served
from .errors import ApiError
from .schema import Asked
from .shape import Head, Shape
from .stream import EventStream

CLIENT_GONE = 499  # nginx' word for it; nobody reads it


async def reply(
    request: Request, served: Served, asked: Asked, prompts: Sequence[Any], shape: Shape, max_tokens: int
) -> Response:
    """Submit, and answer as the request asks.

    Args:
        request: whose connection is watched.
        served: the engine.
        asked: the checked request.
        prompts: texts or lists of token ids.
        shape: of the reply.
        max_tokens: where the request names none.

    Raises:
        ServingError: a prompt or a setting is refused; nothing of the request runs any more.
        ApiError: a generation failed.
    """
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options needs stream to be true", "stream_options", "invalid_value")
    samplings = [asked.sampling(choice, max_tokens) for choice in range(asked.n or 1)]
    choices = len(samplings)
    generations = await group.submit(served, asked.model, prompts, samplings)
    head = Head(shape, asked.model, int(time.time()), with_usage=asked.with_usage)
    if asked.stream:
        return EventStream(head, generations, choices)
    try:
        completions = await group.wait_all(generations, request.receive)
    finally:
        group.cancel(generations)
    if completions is None:
        return Response(status_code=CLIENT_GONE)
    tokens = group.usage(generations, choices, (completion.completion_tokens for completion in completions))
    return JSONResponse(head.reply([shape.whole(completion) for completion in completions], tokens))
