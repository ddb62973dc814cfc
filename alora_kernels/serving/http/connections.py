"""Connections, under uvicorn: how many, how long one may be without a whole request, and without taking its answer.

A request takes as long as its answer takes; only what the client owes has a limit of time. uvicorn's own
`limit_concurrency` counts requests whose head is there, so connections are counted here, where a half-sent head is one
too. h11 reads requests even where httptools is installed, which takes heads, chunk lines and trailers without an end.
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from contextlib import suppress
from typing import Any

import h11
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .errors import ApiError, log, retry_after
from .security import HEAD_BYTES, ServerConfig, address_of, too_long

KERNEL = 64 << 10  # bytes of an answer; left alone it would take up to 4 MiB of each
OTHER_FILES = 256  # that a process has open beside its connections


class Connections:
    """What the connections of one server share: its limits, and how many are open from each address."""

    def __init__(self, config: ServerConfig) -> None:
        self.config, self.of, self.most = config, Counter[str](), config.max_connections
        self.proxies = ProxyHeadersMiddleware(None, list(config.trusted_proxies)).trusted_hosts  # type: ignore[arg-type]
        if (files := _open_files(self.most + OTHER_FILES)) < self.most + OTHER_FILES:
            self.most = max(1, files - OTHER_FILES)
            log.warning("at most %d connections, not %d: raise the limit of open files (ulimit -n)",
                        self.most, config.max_connections)  # fmt: skip

    def refusal(self, opened: int, address: str, host: str) -> ApiError | None:
        """Why one more connection is too many, if it is; trusted proxies bring the clients of many addresses."""
        most, each = self.most, self.config.max_connections_per_address
        if opened > most:
            log.warning("refused a connection from %s: %d are open (--max-connections)", address, most)
            status, whose = 503, ""
        elif self.of[address] > each and host not in self.proxies:
            log.warning("refused a connection from %s: it has %d (--max-connections-per-address)", address, each)
            status, whose, most = 429, f" from {address}", each
        else:
            return None
        said = f"{most} connections are open{whose}, the most this server takes: try again in a while"
        return ApiError(status, said, code="too_many_connections", headers=retry_after(1))


class Connection(H11Protocol):
    """One connection, closed when its client is late."""

    def __init__(self, *args: Any, shared: Connections, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared, self.logger, self.address = shared, log, ""
        self.request_due: asyncio.TimerHandle | None = None
        self.reader_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count it, or refuse it."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # an answer waits for its reader as soon as the kernel takes no more ...
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL)  # ... which it does
        host, port = self.client or ("unknown", 0)
        self.client = (host.removeprefix("::ffff:"), port)  # IPv4, on a socket of both
        self.address = address_of(self.client[0])
        self.shared.of[self.address] += 1
        if refusal := self.shared.refusal(len(self.connections), self.address, self.client[0]):
            return self._refuse(refusal)
        self._time_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        super().connection_lost(exc)
        self.shared.of[self.address] -= 1
        if not self.shared.of[self.address]:
            del self.shared.of[self.address]
        for timer in (self.request_due, self.reader_due):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        before = self.conn.their_state, self.cycle
        super().data_received(data)
        if before[0] is h11.SEND_BODY and before != (self.conn.their_state, self.cycle):
            self._stop_request_clock()  # a request that was answered early is there; the next one has its own time
        self._time_request()

    def _time_request(self) -> None:
        """Start the clock of a request that is not complete, stop that of one that is."""
        owed = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if owed and self.request_due is None and not self.transport.is_closing():
            self.request_due = self.loop.call_later(self.shared.config.request_timeout, self._request_is_late)
        elif not owed:
            self._stop_request_clock()

    def _stop_request_clock(self) -> None:
        if self.request_due is not None:
            self.request_due.cancel()
            self.request_due = None

    def _request_is_late(self) -> None:
        seconds = self.shared.config.request_timeout
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            return self.transport.close()  # nothing was begun: an answer would be taken for the next request's
        log.warning("closed a connection from %s: its request was not complete after %g s", self.address, seconds)
        self._refuse(ApiError(408, f"the request was not complete after {seconds:g} s", code="request_timeout"))

    def pause_writing(self) -> None:
        """The client takes nothing more for now."""
        super().pause_writing()
        self._time_reader()

    def resume_writing(self) -> None:
        """It took everything."""
        super().resume_writing()
        if self.reader_due is not None:
            self.reader_due.cancel()

    def _time_reader(self, before: int | None = None) -> None:
        seconds, left = self.shared.config.send_timeout, self.transport.get_write_buffer_size()
        if left == before:
            log.warning("closed a connection from %s: it took nothing of its answer for %g s", self.address, seconds)
            return self.transport.abort()
        self.reader_due = self.loop.call_later(seconds, self._time_reader, left)

    def _should_upgrade(self) -> bool:
        return False  # there is no websocket here, and uvicorn would advise to install one

    def send_400_response(self, msg: str) -> None:
        """What h11 cannot read, in the shape of all refusals."""
        if len(self.conn.trailing_data[0]) > HEAD_BYTES:
            return self._refuse(too_long())
        self._refuse(ApiError(400, "this is not HTTP/1.1 as it should be", code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error.response()
            headers, reason = [*response.raw_headers, CLOSE_HEADER], STATUS_PHRASES[error.status]
            head = h11.Response(status_code=error.status, headers=headers, reason=reason)
            begun = self.conn.our_state is h11.SEND_RESPONSE  # else the scope is that of the request before
            body = b"" if begun and self.scope["method"] == "HEAD" else bytes(response.body)
            whole = (head, h11.Data(data=body), h11.EndOfMessage())
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in whole))
        if self.cycle is not None and not self.cycle.response_complete:  # the application is not to answer as well
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _open_files(wanted: int) -> int:
    """Raise this process's limit of open files to `wanted`, as far as that may be; how many of these it has."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return soft
    return wanted
