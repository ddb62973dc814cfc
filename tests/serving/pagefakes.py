"""For tests of the playground: a server with its endpoints that streams words, at the pace and with the faults told.

In:   `FakeServer(tasks, delay, key, faults)`; a test may change them while it runs.
Out:  `fake.app()`, for `httpserver.listening`.
Who:  test_serve_page.py.

The page is served as the real server must: files of serving/server/page at the root, nothing but this origin allowed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAGE = files("alora_kernels.serving") / "http" / "page"
HEADERS = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff"}
BASE = "tiny-base"
PROMPTS = {
    "movie": {
        "template": "Review: {text}\nSentiment:",
        "answers": ["positive", "negative"],
        "sample": "Review: a warm, funny film.\nSentiment:",
    },
    "news": {"template": "News: {title}\n{text}\nSection:", "answers": [], "sample": None},
}


@dataclass
class FakeServer:
    """What the fake does.

    Attributes:
        tasks: names besides the base.
        delay: seconds between two words.
        words: an answer ends after so many, or at max_tokens.
        allowed: an answer waits while it has so many words; raise it to let all go on.
        key: API key that is asked for, if any.
        faults: task -> "refuse" (400), "full" (429), "event" (an error in the stream), "cut" (the stream ends early).
        prompts: task -> how it was asked in training, as /v1/models has it.
        bodies: what was asked.
    """

    tasks: list[str] = field(default_factory=lambda: ["movie", "spam", "news"])
    delay: float = 0.01
    words: int = 5000
    allowed: int = 10**9
    key: str | None = None
    state: str = "ready"
    faults: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, Any] = field(default_factory=lambda: dict(PROMPTS))
    bodies: list[dict[str, Any]] = field(default_factory=list)
    stats_asked: int = 0
    running: int = 0
    tokens: int = 0

    def app(self) -> Starlette:
        routes = [
            Route("/", self.page),
            Route("/v1/models", self.models),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/stats", self.stats),
            Route("/{name}", self.page),
        ]
        return Starlette(routes=routes)

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error(401, "an API key is needed")

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in {path.name for path in PAGE.iterdir()}:
            return error(404, "not found")
        return FileResponse(str(PAGE / name), headers=HEADERS)

    async def models(self, request: Request) -> Response:
        base = {"id": BASE, "object": "model", "created": 0, "owned_by": "alora-kernels"}
        entries = [base] + [
            {**base, "id": name, "root": name, "parent": BASE, "prompt": self.prompts.get(name)} for name in self.tasks
        ]
        return self.refused(request) or JSONResponse({"object": "list", "data": entries})

    async def stats(self, request: Request) -> Response:
        self.stats_asked += 1
        numbers = {"max_batch": 32, "max_waiting": 256, "uptime": 1.0, "cache_used": 0.12, "requests_finished": 3}
        numbers |= {"running": self.running, "batch_requests": self.running, "batch_rows": self.running}
        numbers |= {"waiting": 0, "tokens_generated": self.tokens, "tokens_per_second": self.running / self.delay}
        numbers |= {"tasks_known": len(self.tasks), "tasks_resident": min(64, len(self.tasks))}
        return self.refused(request) or JSONResponse({"state": self.state, **numbers})

    async def completions(self, request: Request) -> Response:
        if refusal := self.refused(request):
            return refusal
        body = await request.json()
        self.bodies.append(body)
        fault = self.faults.get(body["model"])
        if fault == "refuse":
            return error(400, "the prompt is longer than the context")
        if fault == "full":
            return error(429, "256 requests are waiting already", {"Retry-After": "1"})
        if not body.get("stream"):
            text = "".join(self.answer(body))
            return JSONResponse({"id": "c", "object": "text_completion", "created": 0, "model": body["model"],
                                 "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]})  # fmt: skip
        return StreamingResponse(self.stream(body, fault), media_type="text/event-stream")

    def answer(self, body: dict[str, Any]) -> list[str]:
        said = f"{body['model']} read: {body['prompt']} " + "and then came one more word " * self.words
        return [word + " " for word in said.split(" ")][: min(self.words, body["max_tokens"])]

    async def stream(self, body: dict[str, Any], fault: str | None) -> AsyncIterator[str]:
        words = self.answer(body)
        self.running += 1
        try:
            for count, word in enumerate(words):
                while count >= self.allowed:
                    await asyncio.sleep(0.01)
                if count == 3 and fault == "event":
                    yield event({"error": {"message": "the engine gave up on this request"}})
                    return
                if count == 3 and fault == "cut":
                    return
                self.tokens += 1
                yield event({"choices": [{"index": 0, "text": word, "finish_reason": None}], "usage": None})
                await asyncio.sleep(self.delay)
            finish = "length" if len(words) == body["max_tokens"] else "stop"
            yield event({"choices": [{"index": 0, "text": "", "finish_reason": finish}], "usage": None})
            yield event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(words)}})
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "code": None}}, status, headers=headers)


def event(data: object) -> str:
    return f"data: {json.dumps(data)}\n\n"
