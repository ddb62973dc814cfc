"""GET /health, /stats and /metrics: whether it lives, what it does now, what it did.

In:   the engine's state and numbers.
Out:  JSON for people and the playground, Prometheus' text for collectors.
Who:  load balancers (health needs no key), the playground (every 0.5 s), Prometheus.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from anyio.to_thread import run_sync
from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from .config import Served


def router(served: Served) -> APIRouter:
    """The three routes."""
    routes, engine = APIRouter(), served.engine

    @routes.get("/health")
    async def health() -> JSONResponse:
        """200 while requests are taken, else 503."""
        state = engine.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @routes.get("/stats")
    async def stats() -> dict[str, Any]:
        """Numbers of this moment, the base's name and the tasks' names."""

        def now() -> dict[str, Any]:
            return dataclasses.asdict(engine.stats()) | {
                "base": served.base,
                "tasks": [task.name for task in served.tasks],
            }

        return await run_sync(now)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counters and distributions."""
        return Response(await run_sync(engine.metrics.text), media_type=CONTENT_TYPE_LATEST)

    return routes
