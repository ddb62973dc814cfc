"""Every refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with its status and headers.

The gate and the streams run outside the handlers and build the same body. An unforeseen exception becomes a 500 without
its text, which is for the log, where uvicorn puts it. What clients do wrong is a line of the log once a minute.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..request import (
    AdapterRefusedError,
    NotServingError,
    QueueFullError,
    RequestError,
    ServingError,
    StorageError,
    TaskLostError,
    TaskReplacedError,
    UnknownTaskError,
)

log = logging.getLogger("uvicorn.clients")  # shown as uvicorn's own lines
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
#: kind of refusal -> its status and the word for programs; the first that fits
MEANING: dict[type[ServingError], tuple[int, str | None]] = {
    QueueFullError: (429, "queue_full"),
    NotServingError: (503, "not_serving"),
    TaskReplacedError: (409, "task_replaced"),
    TaskLostError: (503, "task_lost"),
    StorageError: (507, "insufficient_storage"),
    RequestError: (400, "invalid_value"),
    AdapterRefusedError: (400, "adapter_refused"),
    ServingError: (400, None),
}


class OncePerMinute(logging.Filter):
    """One warning a minute of each text, whatever its values; the next one says how many were left out."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this one is shown."""
        if record.levelno != logging.WARNING:
            return True
        since, left_out = self.kinds.get(record.msg, (-math.inf, 0))
        due = (now := time.monotonic()) - since >= 60
        self.kinds[record.msg] = (now, 0) if due else (since, left_out + 1)
        if due and left_out:
            record.msg += f"; {left_out} more like the last such line were left out"
        return due


log.addFilter(OncePerMinute())


@dataclass(eq=False)
class ApiError(Exception):
    """A refusal with its HTTP status; `param` is the field at fault, `code` a word for programs."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as a response."""
        return JSONResponse(self.body, self.status, self.headers)


def retry_after(seconds: float) -> dict[str, str]:
    """The header that says when to come back: whole seconds, at least one."""
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def meaning(error: ServingError) -> ApiError:
    """What a refusal means to a client."""
    status, code = next(meant for kind, meant in MEANING.items() if isinstance(error, kind))
    headers = retry_after(error.retry_after) if isinstance(error, QueueFullError) else None
    return ApiError(status, str(error), getattr(error, "param", None), code, headers)


def _as_api_error(error: Exception, base: str, route: str) -> ApiError:
    """What any exception means to a client; the base is listed among the known models."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownTaskError):
        return ApiError(404, str(UnknownTaskError(error.name, (base, *error.known))), "model", "model_not_found")
    if isinstance(error, HTTPException):
        said = {404: f"there is no {route} here", 405: f"{route}: not with this method"}.get(error.status_code)
        code = None if said is None else "unknown_route"
        return ApiError(error.status_code, said or str(error.detail), code=code, headers=error.headers)
    if isinstance(error, ServingError):
        return meaning(error)
    said = "the server failed on this request; its log says why"
    return ApiError(500, said, None, "internal_error", {"Connection": "close"})  # as uvicorn will


def install(app: FastAPI, base: str) -> None:
    """Answer every exception in this shape; also for routes that do not exist and methods they do not have."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return _as_api_error(error, base, f"{request.method} {request.url.path[:200]}").response()

    for kind in (ApiError, ServingError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
