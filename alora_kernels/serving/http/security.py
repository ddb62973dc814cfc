"""Who is let in, before anything of a request is read: the host it means, its key, its rate.

In:   the headers of every HTTP request.
Out:  the request passes, or a refusal in OpenAI's shape: 403, 401 or 429.
Who:  `create_app` puts it around all routes, so a new route is closed until it is named in `open_paths`.

Keys are compared by digest and all of them each time, so the time taken tells neither how much of a key was right nor
which one. Rates count POSTs only: the playground's polling must not use up what answers may take.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Collection

import limits
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .config import ServerConfig
from .errors import ApiError, retry_after


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """An ASGI middleware.

    Args:
        app: what is behind it.
        config: keys, rate, hosts.
        open_paths: answered without a key.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig, open_paths: Collection[str]) -> None:
        self.app, self.hosts, self.open_paths = app, config.allowed_hosts, frozenset(open_paths)
        self.keys = tuple(_digest(key.encode()) for key in config.api_keys)
        self.rates = limits.parse_many(config.rate_limit) if config.rate_limit else []
        self.counter = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it here."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # there is no websocket here; the server closes it with 403
            return await send({"type": "websocket.close", "code": 1008})
        try:
            self._check(scope, Headers(scope=scope))
        except ApiError as error:
            return await error.response()(scope, receive, send)
        return await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            said = f"this server answers only as {', '.join(self.hosts)}; with --api-key it answers under any name"
            raise ApiError(403, said, code="unknown_host")
        who = self._who(scope, headers) if self.keys and scope["path"] not in self.open_paths else _address(scope)
        if scope["method"] == "POST":
            self._count(who)

    def _who(self, scope: Scope, headers: Headers) -> str:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # header bytes as they came
        right = [hmac.compare_digest(given, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(right):
            said = "a key is needed: send the header Authorization: Bearer KEY with one this server was started with"
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {right.index(True)}"

    def _count(self, who: str) -> None:
        for rate in self.rates:
            if not self.counter.hit(rate, who):
                wait = self.counter.get_window_stats(rate, who).reset_time - time.time()
                said = f"more than {rate}: try again in {max(1, round(wait))} s"
                raise ApiError(429, said, code="rate_limit_exceeded", headers=retry_after(wait))


def _address(scope: Scope) -> str:
    return f"address {scope['client'][0] if scope.get('client') else 'unknown'}"


def _name(host: str) -> str:
    """A Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
