"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: tasks come and go while others are served, as in vLLM.

In:   a name and a folder of the server's machine.
Out:  one line of text, as vLLM says it; a refusal with the reason.
Who:  whoever may load: nobody unless the operator named folders (`--adapter-root`).

A path is resolved, links included, before it is compared with the roots, and what lies outside is refused in the same
words whether it exists or not. What can write below a root can still change a folder after that look; the adapter
reader trusts nothing it finds there.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from ..errors import UnknownTaskError
from . import openai
from .config import Served
from .errors import ApiError
from .schema import LoadAdapter, UnloadAdapter

FILES = "adapter_*"  # what an adapter is read from


def inside(path: str, roots: Iterable[Path]) -> Path:
    """The folder that a path means, if it lies below a root.

    Args:
        path: absolute, or relative to a root; `~` is a name like any other.
        roots: resolved folders.

    Raises:
        ApiError: 403, the same for every path that is not inside.
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


def router(served: Served) -> APIRouter:
    """The two routes; one load at a time, outside the event loop."""
    routes, one_at_a_time = APIRouter(), CapacityLimiter(1)
    config, store = served.config, served.engine.store
    refused = (
        "this server loads and unloads nothing over HTTP: start it with --adapter-root DIR to allow folders below DIR"
    )

    @routes.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> PlainTextResponse:
        """Load a task, or with load_inplace replace one; what runs keeps the version it began with."""
        asked = await openai.read(request, LoadAdapter, config.max_body_bytes)
        if not config.adapter_roots or store is None:
            raise ApiError(403, refused, code="forbidden")
        if asked.lora_name == served.base:
            raise ApiError(400, f"{served.base!r} is the base model's name: choose another", "lora_name")
        folder = await run_sync(inside, asked.lora_path, config.adapter_roots)

        load = partial(store.load, folder, name=asked.lora_name, task=asked.task, replace=asked.load_inplace)
        await run_sync(load, limiter=one_at_a_time)
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> PlainTextResponse:
        """Forget a task; requests that run on it finish."""
        asked = await openai.read(request, UnloadAdapter, config.max_body_bytes)
        if not config.adapter_roots or store is None:
            raise ApiError(403, refused, code="forbidden")
        if asked.lora_name == served.base:
            raise ApiError(400, f"{served.base!r} is the base model: it stays while the server runs", "lora_name")
        try:
            await run_sync(store.unload, asked.lora_name, limiter=one_at_a_time)
        except UnknownTaskError as error:  # the base, which other refusals list too, is none that could be unloaded
            raise ApiError(404, str(error), "lora_name", "model_not_found") from None
        return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")

    return routes
