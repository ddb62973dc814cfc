"""The engine over HTTP, as OpenAI's clients speak it: `alora serve`, or mounted elsewhere by `create_app`.

    app, run         putting it together, the playground at /; sockets and signals
    security         what an operator sets; who is let in: keys, rates, hosts
    errors           every refusal in OpenAI's shape
    openai           the two ways to ask: bodies, fields, prompts, how replies look
    answer, stream   how both are answered, whole or piece by piece
    admin            what can be asked, loading and unloading, health and numbers

Importing this imports no web framework until a name is asked for.
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
