"""Refusals of requests and adapters by name: the HTTP server gives each a status, others catch `ServingError`."""

from __future__ import annotations

from collections.abc import Sequence


class ServingError(ValueError):
    """A request or an adapter that is refused; everything that runs goes on."""


class RequestError(ServingError):
    """A request whose contents cannot be served: `param` names the setting at fault as the user knows it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownTaskError(ServingError):
    """No such task among the names that exist."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        super().__init__(f"no model or task is called {name!r}: known are {listed or 'none'}")
        self.name, self.known = name, tuple(known)


class AdapterRefusedError(ServingError):
    """An adapter folder that does not fit or cannot be trusted; the message says why."""


class QueueFullError(ServingError):
    """More requests wait than the engine may hold; a place is likely after `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in about {retry_after:.0f} s")
        self.waiting, self.retry_after = waiting, retry_after


class NotServingError(ServingError):
    """The engine is starting, finishing what runs, or stopped: it takes no new request."""
