"""The application: routes, the gate around them, refusals in one shape, and the playground at /.

FastAPI's own pages of documentation are off: they load their scripts from elsewhere, and bodies are read by `openai`.
The playground's policy lets a browser load only its files and talk only to this server. Only file names found when the
server starts are routes, so no path of a request ever becomes a path of the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI
from starlette.responses import FileResponse, Response

from . import admin, errors, openai
from .errors import ApiError
from .security import Gate, ServerConfig

if TYPE_CHECKING:
    from ..engine import Engine

PAGE = Path(__file__).parent / "page"
INDEX, ICON = "/", "/favicon.ico"
KINDS = (".css", ".html", ".js", ".png", ".svg")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """Put the application together; it neither starts nor stops the engine.

    Raises:
        ValueError: a task has the base model's name.
    """
    base = config.base_model_id
    if engine.store is not None and base in engine.store.names():
        raise ValueError(f"a task is called {base!r} like the base: give base_model_id another value")
    app = FastAPI(title="alora-kernels", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.include_router(openai.router(engine, config))
    app.include_router(admin.router(engine, config))
    pages = _pages()
    app.include_router(_playground(pages))
    errors.install(app, base)
    app.add_middleware(Gate, config=config, open_paths=(*pages, ICON, "/health"))  # the rest needs a key
    return app


def _pages() -> dict[str, Path]:
    """URL path -> file."""
    files = sorted(PAGE.iterdir()) if PAGE.is_dir() else []
    named = {f"/{file.name}": file for file in files if file.suffix in KINDS and file.name != "index.html"}
    return {INDEX: PAGE / "index.html", **named}


def _playground(files: dict[str, Path]) -> APIRouter:
    """One route per file; browsers also ask for /favicon.ico, which there is none of."""
    routes = APIRouter()

    def serve(path: str, file: Path) -> None:
        @routes.get(path, name=file.name)
        async def page() -> Response:
            if not file.is_file():
                raise ApiError(404, f"{file.name} is not installed: the API is under /v1", code="not_installed")
            return FileResponse(file, headers=HEADERS)

    for path, file in files.items():
        serve(path, file)

    @routes.get(ICON)
    async def icon() -> Response:
        return Response(status_code=204)

    return routes
