"""The engine behind OpenAI's HTTP interface: `alora serve`, or mounted elsewhere by `create_app`.

A request passes the gate (`security`), is read and shaped by `openai` or `admin`, and answered by `answer`; `errors`
gives every refusal one shape, and `app` puts it all together. No web framework is imported before a name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import names_later
from ...text import install

if TYPE_CHECKING:
    from .app import bind, create_app, serve
    from .security import ServerConfig

_WHERE = {"ServerConfig": "security", "bind": "app", "create_app": "app", "serve": "app"}

__all__ = ["ServerConfig", "bind", "create_app", "serve"]

__getattr__ = names_later(
    __name__,
    _WHERE,
    needs=("fastapi", "starlette", "uvicorn", "limits", "pydantic", "anyio"),
    remedy=f"the server needs FastAPI: {install('serving')}",
)
