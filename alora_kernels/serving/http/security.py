"""Settings of a server, and the gate that enforces them before the body of a request is read.

The gate is around all routes, so a new one is closed until it is named in `open_paths`. The defaults suit one person on
one machine. Keys are compared by digest and all of them each time, so the time taken tells neither how much of a key
was right nor which one. Rates count POSTs only: the playground's polling must not use up what answers may take.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import limits
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, retry_after

MIB = 1 << 20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to host."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


@dataclass(frozen=True)
class ServerConfig:
    """Settings of one server; a ValueError names a setting out of its range."""

    base_model_id: str  # the name under which the base alone is asked for
    host: str = "127.0.0.1"
    port: int = 8000  # 0 takes a free one
    api_keys: tuple[str, ...] = ()  # any of these opens the server; empty: no key is asked for
    max_body_bytes: int = MIB  # longer requests are refused with 413
    rate_limit: str | None = None  # such as "60/minute" or "5/second;1000/hour", per key or client address
    adapter_roots: tuple[Path, ...] = ()  # folders below which adapters may be loaded over HTTP; empty: none may
    # values of the Host header that are answered, None: all. Without a key on loopback this keeps web pages whose name
    # was rebound to 127.0.0.1 from talking to the server
    allowed_hosts: tuple[str, ...] | None = None
    drain_timeout: float = 60.0  # seconds that running requests may take after SIGTERM

    def __post_init__(self) -> None:
        if not self.base_model_id:
            raise ValueError("base_model_id must not be empty: it is the name clients ask the base by")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in 0 .. 65535, got {self.port}")
        if isinstance(self.api_keys, str) or any(not key.strip() for key in self.api_keys):
            raise ValueError("api_keys must be a tuple of keys that are not empty")
        if self.max_body_bytes < 1:
            raise ValueError(f"max_body_bytes must be at least 1, got {self.max_body_bytes}")
        if self.drain_timeout < 0:
            raise ValueError(f"drain_timeout must be at least 0 s, got {self.drain_timeout}")
        if self.rate_limit is not None:
            try:
                limits.parse_many(self.rate_limit)
            except ValueError as error:
                raise ValueError(
                    f"rate_limit {self.rate_limit!r} is not understood: write it like 60/minute or 5/second;1000/hour"
                ) from error
        for root in self.adapter_roots:
            if not Path(root).is_dir():
                raise ValueError(f"adapter_roots: {root} is not a folder")
        object.__setattr__(self, "adapter_roots", tuple(Path(root).resolve() for root in self.adapter_roots))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """An ASGI middleware: a request passes, or is refused with 403, 401 or 429. `open_paths` need no key."""

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
        who = f"address {scope['client'][0] if scope.get('client') else 'unknown'}"
        if self.keys and scope["path"] not in self.open_paths:
            who = self._key(headers)
        for rate in self.rates if scope["method"] == "POST" else ():
            if not self.counter.hit(rate, who):
                wait = self.counter.get_window_stats(rate, who).reset_time - time.time()
                said = f"more than {rate}: try again in {max(1, round(wait))} s"
                raise ApiError(429, said, code="rate_limit_exceeded", headers=retry_after(wait))

    def _key(self, headers: Headers) -> str:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # header bytes as they came
        right = [hmac.compare_digest(given, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(right):
            said = "a key is needed: send the header Authorization: Bearer KEY with one this server was started with"
            raise ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return f"key {right.index(True)}"


def _name(host: str) -> str:
    """A Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
