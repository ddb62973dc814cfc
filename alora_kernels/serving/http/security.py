"""Settings of a server, and the gate that enforces them before the body of a request is read.

The gate is around all routes, so a new one is closed until it is named in `open_paths`. The defaults suit one person on
one machine. Keys are compared by digest and all of them each time, so the time taken tells neither how much of a key
was right nor which one. Rates count POSTs only: the playground's polling must not use up what answers may take.

An address that tries one wrong key after the other gets 429, and then for right keys too, else it could go on guessing;
not so keys that it has used before, since others may live behind it. A wrong key that is repeated is no guess.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import limits
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter, RateLimiter
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError, log, retry_after

MIB = 1 << 20
HEAD_BYTES, HEAD_FIELDS = 32 << 10, 100  # of a request's line and headers
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to host."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def address_of(host: str) -> str:
    """Whom limits count: an IPv4 address, or half of an IPv6 address, since its owner chooses the other half."""
    with suppress(ValueError):
        ip = ipaddress.ip_address(host.partition("%")[0])
        return host if ip.version == 4 else f"{ip.exploded[:19]}::/64"
    return host[:64]


def too_long() -> ApiError:
    """The refusal of a request whose head is too long."""
    said = f"the request's line and headers are longer than {HEAD_BYTES} bytes or {HEAD_FIELDS} fields"
    return ApiError(431, said, code="headers_too_long")


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
    request_timeout: float = 30.0  # seconds in which a request must come as a whole; its answer may take longer
    send_timeout: float = 60.0  # seconds in which a client must take something of an answer that waits for it
    max_connections: int = 4096  # open at once; fewer where the system allows fewer open files
    max_connections_per_address: int = 2048
    wrong_key_limit: str = "20/minute"  # different wrong keys from one address
    trusted_proxies: tuple[str, ...] = ()  # addresses or networks that may say in X-Forwarded-For who the client is

    def __post_init__(self) -> None:
        if not self.base_model_id:
            raise ValueError("base_model_id must not be empty: it is the name clients ask the base by")
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be in 0 .. 65535, got {self.port}")
        if isinstance(self.api_keys, str) or any(not key.strip() for key in self.api_keys):
            raise ValueError("api_keys must be a tuple of keys that are not empty")
        least = {"max_body_bytes": 1, "max_connections": 1, "max_connections_per_address": 1}
        for name, value in (least | {"drain_timeout": 0, "request_timeout": 0.01, "send_timeout": 0.01}).items():
            if not getattr(self, name) >= value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        for name in ("rate_limit", "wrong_key_limit"):
            try:
                limits.parse_many("1/second" if getattr(self, name) is None else getattr(self, name))
            except ValueError as error:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not understood: write it like 60/minute or 5/second;1000/hour"
                ) from error
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy)
            except ValueError as error:
                raise ValueError(f"trusted_proxies: {error}: give addresses, or networks like 10.0.0.0/8") from None
        for root in self.adapter_roots:
            if not Path(root).is_dir():
                raise ValueError(f"adapter_roots: {root} is not a folder")
        object.__setattr__(self, "adapter_roots", tuple(Path(root).resolve() for root in self.adapter_roots))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """An ASGI middleware: a request passes, or is refused with 431, 403, 401 or 429. `open_paths` need no key."""

    def __init__(self, app: ASGIApp, config: ServerConfig, open_paths: Collection[str]) -> None:
        self.app, self.hosts, self.open_paths = app, config.allowed_hosts, frozenset(open_paths)
        self.keys = tuple(_digest(key.encode()) for key in config.api_keys)
        self.rates = limits.parse_many(config.rate_limit) if config.rate_limit else []
        self.counter, self.wrong = MovingWindowRateLimiter(MemoryStorage()), FixedWindowRateLimiter(MemoryStorage())
        self.guesses = limits.parse_many(config.wrong_key_limit)
        self.repeated = limits.RateLimitItemPerSecond(1, max(rate.get_expiry() for rate in self.guesses))
        self.known: set[tuple[str, int]] = set()  # addresses and right keys they have used
        self.most, self.running = config.max_connections_per_address, Counter[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it here."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # there is no websocket here; the server closes it with 403
            return await send({"type": "websocket.close", "code": 1008})
        address = address_of(scope["client"][0] if scope.get("client") else "unknown")
        self.running[address] += 1
        try:
            self._check(scope, Headers(scope=scope), address)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        else:
            return await self.app(scope, receive, send)
        finally:
            self.running[address] -= 1
            if not self.running[address]:
                del self.running[address]

    def _check(self, scope: Scope, headers: Headers, address: str) -> None:
        size = (
            len(scope["path"]) + len(scope["query_string"]) + sum(len(name) + len(value) for name, value in headers.raw)
        )
        if len(headers.raw) > HEAD_FIELDS or size > HEAD_BYTES:
            raise too_long()
        if self.hosts is not None and _name(headers.get("host", "")) not in self.hosts:
            said = f"this server answers only as {', '.join(self.hosts)}; with --api-key it answers under any name"
            raise ApiError(403, said, code="unknown_host")
        if self.running[address] > self.most:  # direct clients have no more connections than this: behind a proxy
            said = f"{self.most} requests of {address} are running, the most this server takes"
            raise ApiError(429, said, code="too_many_connections", headers=retry_after(1))
        who = f"address {address}"
        if self.keys and scope["path"] not in self.open_paths:
            who = f"key {self._key(headers, address)}"
        for rate in self.rates if scope["method"] == "POST" else ():
            if not self.counter.hit(rate, who):
                raise _too_many(self.counter, rate, who)

    def _key(self, headers: Headers, address: str) -> int:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest((key := key.strip(" \t")).encode("latin-1"))  # header bytes, of which \xa0 is no blank
        right = [hmac.compare_digest(given, known) for known in self.keys]
        said = "a key is needed: send the header Authorization: Bearer KEY with one this server was started with"
        wrong = ApiError(401, said, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scheme.lower() != "bearer" or not key:
            raise wrong
        if any(right) and (address, right.index(True)) in self.known:
            return right.index(True)
        for rate in self.guesses:
            if not self.wrong.test(rate, address):
                log.warning("refused keys from %s: of those it sent, more than %s were wrong", address, rate)
                raise _too_many(self.wrong, rate, address, "wrong keys: ")
        if any(right):
            self.known.add((address, right.index(True)))
            return right.index(True)
        if self.wrong.hit(self.repeated, address, given.hex()):
            for rate in self.guesses:
                self.wrong.hit(rate, address)
        raise wrong


def _too_many(limiter: RateLimiter, rate: limits.RateLimitItem, who: str, what: str = "") -> ApiError:
    wait = limiter.get_window_stats(rate, who).reset_time - time.time()
    said = f"{what}more than {rate}: try again in {max(1, round(wait))} s"
    return ApiError(429, said, code="rate_limit_exceeded", headers=retry_after(wait))


def _name(host: str) -> str:
    """A Host header without its port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
