"""The application: routes, the gate around them, refusals in one shape, the playground at /; served until a signal.

/docs is a page of ours that shows /openapi.json, which needs a key: FastAPI's own load their scripts from elsewhere.
The playground's policy lets a browser load only its files and talk only to this server. Only file names found when the
server starts are routes, so no path of a request ever becomes a path of the disk.

SIGTERM or SIGINT drains: requests that run or wait are answered, new ones get 503, and /health says "draining", so
that a load balancer turns away; after `drain_timeout` what is left is cut off. A second signal cuts it off at once.
uvicorn would raise the signal again at the end, which would skip all clean-up; here the process returns instead.
"""

from __future__ import annotations

import logging
import socket
import threading
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.responses import FileResponse, Response
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from ...version import __version__
from . import admin, errors, openai
from .connections import Connection, Connections
from .errors import ApiError
from .security import HEAD_BYTES, Gate, ServerConfig

if TYPE_CHECKING:
    from ..engine import Engine

log = logging.getLogger(__name__)
FLUSH = 5  # seconds for clients to take what was answered
CUT_OFF = 1  # the same after a second signal
PAGE = Path(__file__).parent / "page"
INDEX, ICON, DOCS = "/", "/favicon.ico", "/docs"
KINDS = (".css", ".html", ".js", ".png", ".svg")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def create_app(engine: Engine, config: ServerConfig) -> FastAPI:
    """Put the application together, around an engine that others start and stop.

    A ValueError if a task has the base model's name.
    """
    base = config.base_model_id
    if engine.store is not None and base in engine.store.names():
        raise ValueError(f"a task is called {base!r} like the base: give base_model_id another value")
    app = FastAPI(title="alora-kernels", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    openai.add_routes(app, engine, config)
    admin.add_routes(app, engine, config)
    files = [file for file in sorted(PAGE.glob("*")) if file.suffix in KINDS and file.suffix != ".html"]
    pages = {INDEX: PAGE / "index.html", DOCS: PAGE / "docs.html", **{f"/{file.name}": file for file in files}}
    for path, file in pages.items():
        _add_page(app, path, file)
    _add_description(app)

    @app.get(ICON, include_in_schema=False)
    async def icon() -> Response:  # browsers ask for it, and there is none
        return Response(status_code=204)

    errors.install(app, base)
    app.add_middleware(Gate, config=config, open_paths=(*pages, ICON, "/health"))  # the rest needs a key
    if config.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(config.trusted_proxies))
    return app


def _add_description(app: FastAPI) -> None:
    bodies = (openai.CompletionRequest, openai.ChatRequest, admin.LoadAdapter, admin.UnloadAdapter)
    schemas = models_json_schema([(body, "validation") for body in bodies], ref_template=openai.WHERE)[1]["$defs"]

    @app.get("/openapi.json", include_in_schema=False)
    def description() -> dict[str, Any]:
        found = get_openapi(title=app.title, version=__version__, routes=app.routes)
        parts: dict[str, Any] = {"schemas": found["components"]["schemas"] | schemas}  # FastAPI knows paths' mistakes
        parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
        return found | {"components": parts, "security": [{"bearer": []}]}


def _add_page(app: FastAPI, path: str, file: Path) -> None:
    @app.get(path, name=file.name, include_in_schema=False)
    async def page() -> Response:
        if not file.is_file():
            raise ApiError(404, f"{file.name} is not installed: the API is under /v1", code="not_installed")
        return FileResponse(file, headers=HEADERS)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, before anything slow begins; port 0 takes a free one.

    A ValueError names the port that is taken, or the address that is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} is no address to listen on: {error}") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's wait is no reason to refuse
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"cannot listen on {host}:{port} ({error.strerror}): choose another --host or --port"
        ) from None
    return bound


class DrainingServer(uvicorn.Server):
    """uvicorn, with the engine drained before the listening socket closes; `cut_off`: running answers were ended."""

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_timeout: float) -> None:
        super().__init__(config)
        self.engine, self.drain_timeout, self.cut_off = engine, drain_timeout, False
        self._signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: drain, beside the event loop. Second: stop, which tells every reader so. Third: leave."""
        self._signals += 1
        if self._signals == 1:
            threading.Thread(target=self._finish, name="drain", daemon=True).start()
            return
        self.cut_off = self.should_exit = True
        self.force_exit = self._signals > 2
        self.config.timeout_graceful_shutdown = CUT_OFF
        threading.Thread(target=self.engine.stop, name="stop", daemon=True).start()

    def _finish(self) -> None:
        try:
            if not self.engine.drain(timeout=self.drain_timeout):
                self.cut_off = True
            self.engine.stop()
        except Exception:
            log.exception("draining failed")
            self.cut_off = True
        self.should_exit = True


def settings(engine: Engine, config: ServerConfig) -> uvicorn.Config:
    """uvicorn's, around the application of an engine."""
    return uvicorn.Config(
        create_app(engine, config),
        http=partial(Connection, shared=Connections(config)),  # type: ignore[arg-type]
        ws="none",
        h11_max_incomplete_event_size=HEAD_BYTES,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # else any client on this machine could name the address it is counted under
        timeout_graceful_shutdown=FLUSH,
    )


def serve(engine: Engine, config: ServerConfig, bound: socket.socket | None = None) -> int:
    """Serve a started engine until SIGTERM or SIGINT, which arrive in the main thread only; it is stopped at the end.

    Args:
        bound: from `bind`; None binds config's host and port.

    Returns:
        0 if every answer was finished, 1 if some were cut off or a second signal came.
    """
    bound = bind(config.host, config.port) if bound is None else bound
    server = DrainingServer(settings(engine, config), engine, config.drain_timeout)
    try:
        server.run(sockets=[bound])
    finally:
        engine.stop()
        bound.close()
    return int(server.cut_off)
