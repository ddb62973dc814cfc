"""What an operator sets, checked once.

In:   names, addresses, keys, limits.
Out:  a frozen `ServerConfig`; `Served`, which is what every route works with.
Who:  `alora serve` fills it; `create_app` reads it.

The defaults suit one person on one machine: loopback, no key, no loading of adapters over HTTP.
"""

from __future__ import annotations

import ipaddress
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import limits

if TYPE_CHECKING:
    from ..engine import Engine
    from ..store import TaskInfo

MIB = 1 << 20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True)
class ServerConfig:
    """Settings of one server.

    Attributes:
        base_model_id: the name under which the base alone is asked for.
        host, port: where to listen; port 0 takes a free one.
        api_keys: any of these opens the server; empty: no key is asked for.
        max_body_bytes: longer requests are refused with 413.
        rate_limit: such as "60/minute" or "5/second;1000/hour", per key or client address; None: no limit.
        adapter_roots: folders below which adapters may be loaded over HTTP; empty: none may.
        allowed_hosts: values of the Host header that are answered; None: all. Without a key on loopback this keeps web
            pages whose name was rebound to 127.0.0.1 from talking to the server.
        drain_timeout: seconds that running requests may take after SIGTERM.

    Raises:
        ValueError: a setting outside its range, named.
    """

    base_model_id: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = MIB
    rate_limit: str | None = None
    adapter_roots: tuple[Path, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    drain_timeout: float = 60.0

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


@dataclass(frozen=True)
class Served:
    """What every route works with.

    Attributes:
        engine: answers.
        config: settings.
        started: unix time, shown as the base model's age.
    """

    engine: Engine
    config: ServerConfig
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def base(self) -> str:
        """The name of the base alone."""
        return self.config.base_model_id

    @property
    def tasks(self) -> list[TaskInfo]:
        """The tasks of now. The store may be busy under its lock: ask in a thread, not in the event loop."""
        return [] if self.engine.store is None else self.engine.store.tasks()

    def task_of(self, model: str) -> str | None:
        """The task that a request's `model` names; None is the base."""
        return None if model == self.base else model
