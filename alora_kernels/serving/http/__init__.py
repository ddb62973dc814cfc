"""The engine behind OpenAI's HTTP interface: `alora serve`, or mounted elsewhere by `create_app`.

    app, run         the application with the playground at /; sockets and signals
    security         settings of the server; keys, rates, hosts
    errors           every refusal in OpenAI's shape
    openai           completions and chats: bodies, fields, prompts, the shape of replies
    answer, stream   whole replies, or piece by piece
    admin            models, loading and unloading, health and metrics

No web framework is imported before a name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import names_later

if TYPE_CHECKING:
    from .app import create_app
    from .run import bind, serve
    from .security import ServerConfig

_WHERE = {"ServerConfig": "security", "bind": "run", "create_app": "app", "serve": "run"}

__all__ = ["ServerConfig", "bind", "create_app", "serve"]

__getattr__ = names_later(
    __name__,
    _WHERE,
    needs=("fastapi", "starlette", "uvicorn", "limits", "pydantic", "anyio"),
    remedy="the server needs FastAPI: pip install 'alora-kernels[serving]'",
)
