"""GET /: the playground, a few files without anything from elsewhere.

In:   what lies in `page/` beside this module; `index.html` is served as /, the others by their names.
Out:  those files, under a policy that lets a browser load nothing but them and talk to nobody but this server.
Who:  people with a browser.

Only names found when the server starts are routes, so no path of a request ever becomes a path of the disk.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from .errors import ApiError

FOLDER = Path(__file__).parent / "page"
INDEX, ICON = "/", "/favicon.ico"
KINDS = (".css", ".html", ".js", ".png", ".svg")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def pages() -> dict[str, Path]:
    """Path of a URL -> file."""
    files = sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []
    named = {f"/{file.name}": file for file in files if file.suffix in KINDS and file.name != "index.html"}
    return {INDEX: FOLDER / "index.html", **named}


def router(files: dict[str, Path]) -> APIRouter:
    """One route per file; browsers also ask for an icon by its old name, which there is none of.

    Args:
        files: of `pages`.
    """
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
