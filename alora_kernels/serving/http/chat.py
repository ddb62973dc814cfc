"""POST /v1/chat/completions: turns of a chat are answered.

In:   messages with text; `model` names the task, or the base.
Out:  a reply of the type `chat.completion`, or a stream of `chat.completion.chunk`.
Who:  OpenAI's clients.

The prompt is made by the tokenizer's chat template; a tokenizer without one gets the contents joined by line ends. As
with OpenAI, an answer without `max_tokens` may fill the context.
"""

from __future__ import annotations

from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ..request import Completion, Piece
from . import openai
from .answer import reply
from .config import Served
from .prompts import chat_prompt
from .schema import ChatRequest

MAX_TOKENS = 4096  # where the engine names no context


class ChatShape:
    """Choices of chats: the first delta names the role, the last one only the reason of the end."""

    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, completion: Completion) -> dict[str, Any]:
        """The choice of a finished answer."""
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"message": message, "logprobs": None, "finish_reason": completion.finish_reason}

    def opening(self) -> list[dict[str, Any]]:
        """The role."""
        return [_choice({"role": "assistant", "content": ""}, None)]

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        """The text, if any; then the reason of the end, if it is the end."""
        text = [_choice({"content": piece.text}, None)] if piece.text else []
        return text + ([_choice({}, piece.finish_reason)] if piece.finish_reason else [])


def _choice(delta: dict[str, Any], finish_reason: str | None) -> dict[str, Any]:
    return {"delta": delta, "logprobs": None, "finish_reason": finish_reason}


def router(served: Served) -> APIRouter:
    """The route."""
    routes, engine = APIRouter(), served.engine

    @routes.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        """Answer a chat."""
        asked = await openai.read(request, ChatRequest, served.config.max_body_bytes)
        if asked.max_completion_tokens is not None:
            asked.max_tokens = asked.max_completion_tokens  # the newer name of the same
        turns = [(message.role, message.content, message.name) for message in asked.messages]
        prompt = await run_sync(chat_prompt, engine, turns)  # a template is a program: not in the loop
        whole_context = engine.config.max_context or MAX_TOKENS  # the engine cuts it to what the prompt leaves
        return await reply(request, served, asked, [prompt], ChatShape(), whole_context)

    return routes
