"""GET /v1/models: the base and every task.

In:   the task store.
Out:  OpenAI's list of models; a task's `parent` is the base, and `prompt` is how it was asked in training: null if its
      folder does not say, else template, answers (label words; none: texts) and sample.
Who:  OpenAI's clients; the playground's list of tasks.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter

from ..errors import UnknownTaskError
from .config import Served

OWNER = "alora-kernels"


def _models(served: Served) -> list[dict[str, Any]]:
    base = {"id": served.base, "object": "model", "created": served.started, "owned_by": OWNER}
    tasks = [
        {
            **base,
            "id": task.name,
            "created": int(task.loaded_at),
            "root": served.base,
            "parent": served.base,
            "prompt": None if task.card is None else asdict(task.card),
        }
        for task in served.tasks
    ]
    return [base | {"root": served.base, "parent": None}, *tasks]


def router(served: Served) -> APIRouter:
    """The two routes. The store may be reading a folder under its lock, so it is asked outside the event loop."""
    routes = APIRouter()

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        """All that can be asked."""
        return {"object": "list", "data": await run_sync(_models, served)}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them; the name of a base may hold slashes."""
        known = {one["id"]: one for one in await run_sync(_models, served)}
        if name not in known:
            raise UnknownTaskError(name[:200], [one for one in known if one != served.base])
        return known[name]

    return routes
