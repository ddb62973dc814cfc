"""A request's body becomes a checked record, or a refusal that names the field.

In:   the bytes of a POST, as they arrive.
Out:  an instance of a model of `schema`.
Who:  every route that takes a body; nothing else reads one, so no other route can be filled up.

Python's own JSON reader takes NaN, half surrogates and a nesting that ends in a RecursionError; pydantic's refuses all
three. Bytes are counted while they come, because a chunked request announces no length. Only `application/json` is
taken: a browser sends that across origins only after asking, and this server never says yes.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from .errors import ApiError
from .schema import IGNORED, NEUTRAL, is_neutral

SECONDS = 30.0  # a body that takes longer to arrive holds a connection for nothing
Model = TypeVar("Model", bound=BaseModel)


async def read(request: Request, model: type[Model], limit: int) -> Model:
    """Read and check the body of a request.

    Args:
        request: its body has not been read yet.
        model: of `schema`.
        limit: most bytes.

    Raises:
        ApiError: 400 (the field is named), 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be JSON with Content-Type: application/json, not {kind[:80]!r}")
    try:
        async with asyncio.timeout(SECONDS):
            content = await _bytes(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {SECONDS:.0f} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away before the body was complete") from None
    try:
        fields = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return _checked(fields, model)


async def _bytes(request: Request, limit: int) -> bytes:
    announced = request.headers.get("content-length", "0")
    too_long = ApiError(413, f"the body is longer than {limit} bytes, the most this server takes", code="body_too_long")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_long
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise too_long
    return bytes(content)


def _checked(fields: dict[str, Any], model: type[Model]) -> Model:
    known = model.model_fields
    for name in [name for name in fields if name not in known]:
        if name in NEUTRAL and not is_neutral(name, fields[name]):
            raise ApiError(400, f"{name} is not supported: leave it out", name, "unsupported_field")
        if name in NEUTRAL or name in IGNORED:
            del fields[name]
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"unknown field {where[:200]!r}", where[:200], "unknown_field") from None
        said = first["msg"].removeprefix("Value error, ")
        if not where:  # of several fields: the words begin with the one at fault
            raise ApiError(400, said, said.partition(" ")[0], "invalid_value") from None
        raise ApiError(400, f"{where}: {said}", where, "invalid_value") from None
