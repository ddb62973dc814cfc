"""The engine over HTTP, as OpenAI's clients speak it.

In:   an engine (`alora_kernels.serving.Engine`) and a `ServerConfig`.
Out:  `create_app` makes the application, `serve` runs it until a signal, with a drain.
Who:  `alora serve`; anybody who mounts the application elsewhere.

    config, app, run            what an operator sets; putting it together; sockets and signals
    gate, body, schema, prompts what is let in: keys, rates, hosts; sizes and JSON; the fields; the texts
    errors                      every refusal in OpenAI's shape
    completions, chat           the two ways to ask
    replies, shape, stream      how both are answered; group: the generations of one request
    models, adapters, observe   what can be asked, loading and unloading, health and numbers
    static, page/               the playground at /

Importing this imports no web framework until a name is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..._lazy import names_later

if TYPE_CHECKING:
    from .app import create_app
    from .config import ServerConfig
    from .run import bind, serve

_WHERE = {"ServerConfig": "config", "bind": "run", "create_app": "app", "serve": "run"}

__all__ = ["ServerConfig", "bind", "create_app", "serve"]

__getattr__ = names_later(
    __name__,
    _WHERE,
    needs=("fastapi", "starlette", "uvicorn", "limits", "pydantic", "anyio"),
    remedy="the server needs FastAPI: pip install 'alora-kernels[serving]'",
)
