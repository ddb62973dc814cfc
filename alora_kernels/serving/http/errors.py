"""Every refusal in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`, with its status and headers.

The gate and the streams run outside the handlers and build the same body. An unforeseen exception becomes a 500 without
its text, which is for the log, where uvicorn puts it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..errors import AdapterRefusedError, NotServingError, QueueFullError, RequestError, ServingError, UnknownTaskError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A refusal with its HTTP status; `param` is the field at fault, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

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


def as_api_error(error: Exception, base: str) -> ApiError:
    """What any exception means to a client; the base is listed among the known models."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownTaskError):
        said = str(UnknownTaskError(error.name, (base, *error.known)))
        return ApiError(404, said, "model", "model_not_found")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), None, "queue_full", retry_after(error.retry_after))
    if isinstance(error, NotServingError):
        return ApiError(503, str(error), None, "not_serving")
    if isinstance(error, RequestError):
        return ApiError(400, str(error), error.param, "invalid_value")
    if isinstance(error, AdapterRefusedError):
        return ApiError(400, str(error), None, "adapter_refused")
    if isinstance(error, ServingError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server failed on this request; its log says why", None, "internal_error")


def install(app: FastAPI, base: str) -> None:
    """Answer every exception in this shape; also for routes that do not exist and methods they do not have."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            what = f"{request.method} {request.url.path[:200]}"
            said = f"there is no {what} here" if error.status_code == 404 else f"{what}: not with this method"
            return ApiError(error.status_code, said, code="unknown_route", headers=error.headers).response()
        return as_api_error(error, base).response()

    for kind in (ApiError, ServingError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
