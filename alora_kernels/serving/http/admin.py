"""/v1/models, /health, /stats, /metrics; tasks are loaded and unloaded while others run.

The store may be moving a task's rows under its lock, so it is asked outside the event loop (FastAPI calls what is not
`async` in a thread). Nobody may load unless the operator named folders (`--adapter-root`). Whoever can write below one
can still change a folder after it was checked; the adapter reader trusts nothing there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..request import UnknownTaskError
from .errors import ApiError
from .openai import Fields, read, takes
from .security import ServerConfig

if TYPE_CHECKING:
    from ..engine import Engine
    from ..store import TaskStore

FILES = "adapter_*"  # what an adapter is read from
OWNER = "alora-kernels"
CLOSED = "this server loads and unloads nothing over HTTP: start it with --adapter-root DIR to allow folders below DIR"


class Named(Fields):
    """What loading and unloading have in common."""

    lora_name: str = Field(min_length=1, max_length=512)


class LoadAdapter(Named):
    """`task` chooses one of a folder that holds several."""

    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    task: str | None = None


class UnloadAdapter(Named):
    """Names are enough here: vLLM's number is taken and not used."""

    lora_int_id: int | None = None


def inside(path: str, roots: Iterable[Path]) -> Path:
    """The folder that a path means, absolute or relative to one of the resolved roots, links resolved.

    The same 403 for all outside, whether it exists or not; `~` is a name like any other.
    """
    refused = ApiError(403, "lora_path must lie below a folder given with --adapter-root", "lora_path", "forbidden")
    if "\0" in path:
        raise refused
    for root in roots:
        try:
            folder = (root / path).resolve()
            files = [folder, *(file.resolve() for file in folder.glob(FILES))] if folder.is_relative_to(root) else []
        except (OSError, RuntimeError, ValueError):  # too long, a circle of links
            continue
        if files and all(any(file.is_relative_to(allowed) for allowed in roots) for file in files):
            return folder
    raise refused


def add_routes(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """The routes of this file.

    A listed task's `parent` is the base, and `prompt` is how it was asked in training: null if the task's folder does
    not say, else template, or chat with its chat_template and system, answers (label words; none: texts) and sample.
    """
    base, now = config.base_model_id, int(time.time())
    of_base = {"id": base, "object": "model", "created": now, "owned_by": OWNER, "root": base, "parent": None}

    def listed() -> list[dict[str, Any]]:
        models = [of_base]
        for task in [] if engine.store is None else engine.store.tasks():
            card = None if task.card is None else dataclasses.asdict(task.card)
            models.append(of_base | {"id": task.name, "created": int(task.loaded_at), "parent": base, "prompt": card})
        return models

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": listed()}

    @app.get("/v1/models/{name:path}")  # the name of a base may hold slashes
    def one(name: str) -> dict[str, Any]:
        known = {model["id"]: model for model in listed()}
        if name not in known:
            raise UnknownTaskError(name[:200], [one for one in known if one != base])
        return known[name]

    @app.get("/health")
    async def health() -> JSONResponse:
        state = engine.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/stats")
    def stats() -> dict[str, Any]:
        tasks = [] if engine.store is None else engine.store.names()
        return dataclasses.asdict(engine.stats()) | {"base": base, "tasks": tasks}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(engine.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    _add_loading(app, engine, config)


def _add_loading(app: FastAPI, engine: Engine, config: ServerConfig) -> None:
    """One load at a time, outside the event loop."""
    one_at_a_time, base = CapacityLimiter(1), config.base_model_id

    async def checked(request: Request, model: type[Named], not_the_base: str) -> tuple[Any, TaskStore]:
        asked = await read(request, model, config)
        if not config.adapter_roots or engine.store is None:
            raise ApiError(403, CLOSED, code="forbidden")
        if asked.lora_name == base:
            raise ApiError(400, not_the_base, "lora_name")
        return asked, engine.store

    @app.post("/v1/load_lora_adapter", openapi_extra=takes(LoadAdapter))
    async def load_adapter(request: Request) -> PlainTextResponse:
        asked, store = await checked(request, LoadAdapter, f"{base!r} is the base model's name: choose another")
        folder = await run_sync(inside, asked.lora_path, config.adapter_roots)
        load = partial(store.load, folder, name=asked.lora_name, task=asked.task, replace=asked.load_inplace)
        await run_sync(load, limiter=one_at_a_time)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter", openapi_extra=takes(UnloadAdapter))
    async def unload_adapter(request: Request) -> PlainTextResponse:
        asked, store = await checked(
            request, UnloadAdapter, f"{base!r} is the base model: it stays while the server runs"
        )
        try:
            await run_sync(store.unload, asked.lora_name, limiter=one_at_a_time)
        except UnknownTaskError as error:  # the base, which other refusals list too, is none that could be unloaded
            raise ApiError(404, str(error), "lora_name", "model_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
