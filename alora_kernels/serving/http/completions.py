"""POST /v1/completions: a text is continued.

In:   one prompt or up to 64, as text or token ids; `model` names the task, or the base.
Out:  a reply or a stream of the type `text_completion`.
Who:  OpenAI's clients, the playground, `bench serving`.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..request import Completion, Piece
from . import openai
from .answer import reply
from .config import Served
from .schema import CompletionRequest

MAX_TOKENS = 16  # OpenAI's default


class CompletionShape:
    """Choices of completions."""

    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The choice of a finished answer."""
        return _choice(completion.text, completion.finish_reason)

    def opening(self) -> list[dict[str, Any]]:
        """Nothing precedes the text."""
        return []

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        """One choice, unless there is nothing to say."""
        return [_choice(piece.text, piece.finish_reason)] if piece.text or piece.finish_reason else []


def _choice(text: str, finish_reason: str | None) -> dict[str, Any]:
    return {"text": text, "logprobs": None, "finish_reason": finish_reason}


def router(served: Served) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(request: Request) -> Response:
        """Continue texts."""
        asked = await openai.read(request, CompletionRequest, served.config.max_body_bytes)
        return await reply(request, served, asked, asked.prompt, CompletionShape(), MAX_TOKENS)

    return routes
