"""The application: routes, the gate around them, refusals in one shape.

In:   an engine that runs, or will, and a `ServerConfig`.
Out:  an ASGI application.
Who:  `run.serve`; tests; anybody who mounts it in a server of their own.

FastAPI's own pages of documentation are off: they load their scripts from elsewhere, and bodies are read by `body`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI

from . import admin, chat, completions, errors, models, observe, static
from .config import Served, ServerConfig
from .security import Gate

if TYPE_CHECKING:
    from ..engine import Engine


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """Put the application together; it neither starts nor stops the engine.

    Args:
        engine: answers the requests.
        config: settings.

    Raises:
        ValueError: a task has the base model's name.
    """
    served = Served(engine, config)
    if config.base_model_id in [task.name for task in served.tasks]:
        raise ValueError(f"a task is called {config.base_model_id!r} like the base: give base_model_id another value")
    app = FastAPI(title="alora-kernels", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for part in (completions, chat, models, admin, observe):
        app.include_router(part.router(served))
    pages = static.pages()
    app.include_router(static.router(pages))
    errors.install(app, config.base_model_id)
    app.add_middleware(Gate, config=config, open_paths=(*pages, static.ICON, "/health"))  # the rest needs a key
    return app
