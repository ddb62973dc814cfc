"""Clients on raw sockets: that never finish, never read, never end a header, or are too many."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress

import httpx
import pytest
from enginefakes import FakeEngine
from httpserver import running
from test_serve_http import ASK

from alora_kernels.serving import EngineConfig
from alora_kernels.serving.http import ServerConfig, connections
from alora_kernels.serving.http.errors import OncePerMinute, log

JSON = b"Host: localhost\r\nContent-Type: application/json\r\n"
LATE = 0.4  # seconds a request may take here


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Lines about clients, as if none had been logged for a minute; uvicorn takes away handlers when it starts."""
    said: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        said.append(record.getMessage())
        return True

    (once,) = log.filters
    once.kinds.clear()
    log.addFilter(note)
    yield said
    log.removeFilter(note)


def connect(url: str, source: str = "127.0.0.1", window: int | None = None) -> socket.socket:
    wire = socket.socket()
    if window is not None:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    wire.settimeout(30)
    wire.bind((source, 0))
    wire.connect((url.split("/")[2].split(":")[0], int(url.rsplit(":", 1)[1])))
    return wire


def post(fields: dict, more: bytes = b"", path: bytes = b"/v1/completions") -> bytes:
    body = json.dumps(fields).encode()
    return b"POST %s HTTP/1.1\r\n%s%sContent-Length: %d\r\n\r\n%s" % (path, JSON, more, len(body), body)


def until_closed(wire: socket.socket) -> bytes:
    """All that comes until the server closes; a reset ends it too."""
    got = b""
    with suppress(ConnectionResetError):
        while piece := wire.recv(1 << 16):
            got += piece
    return got


def dripped(wire: socket.socket, drop: bytes) -> bytes:
    """The same, while a drop is sent again and again."""
    wire.settimeout(0.05)
    got, end = b"", time.monotonic() + 30
    while time.monotonic() < end:
        try:
            wire.sendall(drop)
            piece = wire.recv(1 << 16)
            if not piece:
                return got
            got += piece
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return got
    raise AssertionError("the server took drops for 30 s")


def error(answer: bytes, status: int) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status) and b"connection: close" in head.lower(), answer
    return json.loads(body)["error"]


# ------------------------------------------------------------------ requests that are never complete


@pytest.mark.parametrize(
    ("begun", "drop"),
    [
        (b"", b""), (b"GET /hea", b""), (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ", b""),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"a"), (b"", b"G"),
        (post(ASK)[:-5], b""), (b"POST /v1/completions HTTP/1.1\r\n%sContent-Length: 900\r\n\r\n" % JSON, b" "),
        (b"POST /v1/completions HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n" % JSON, b"1\r\n \r\n"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n", b" "),
    ],
)  # fmt: skip
def test_a_request_that_is_never_complete_is_ended(engine, logged, begun, drop):
    with running(engine, ServerConfig("tiny", request_timeout=LATE)) as url, closing(connect(url)) as wire:
        wire.sendall(begun)
        answer = dripped(wire, drop) if drop else until_closed(wire)
        assert httpx.get(url + "/health").status_code == 200
    if begun.startswith(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent"):
        assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1  # it was answered early
    elif begun or drop:
        assert error(answer, 408)["code"] == "request_timeout"
    else:
        assert answer == b""
    assert len(logged) == bool(begun or drop)
    assert engine.idle()


def test_an_answer_may_take_longer_than_a_request_and_so_may_the_next_one(logged):
    config = ServerConfig("tiny", request_timeout=LATE)
    with (
        FakeEngine(words=30, delay=0.04) as engine,
        running(engine, config) as url,
        closing(connect(url)) as wire,
    ):
        for _ in range(2):
            started = time.monotonic()
            wire.sendall(post(ASK | {"stream": True, "max_tokens": 30}))
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                got += wire.recv(1 << 16)
            assert b"[DONE]" in got and got.count(b"movie29") == 1 and time.monotonic() - started > 2 * LATE
            time.sleep(LATE / 2)
    assert not logged


def test_the_time_of_a_request_that_was_answered_early_is_not_that_of_the_next(engine, logged):
    with running(engine, ServerConfig("tiny", request_timeout=1)) as url, closing(connect(url)) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1234")
        assert b'"ready"' in wire.recv(1 << 16)
        time.sleep(0.6)
        wire.sendall(b"56789")
        time.sleep(0.1)
        wire.sendall(post(ASK)[:-5])
        time.sleep(0.6)  # 1.3 s after the first request began
        wire.sendall(post(ASK)[-5:])
        assert wire.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert not logged


def test_many_late_clients_are_one_line_of_the_log(engine, logged):
    with running(engine, ServerConfig("tiny", request_timeout=LATE)) as url, ExitStack() as open_ones:
        wires = [open_ones.enter_context(closing(connect(url))) for _ in range(20)]
        for wire in wires:
            wire.sendall(b"GET ")
        for wire in wires:
            error(until_closed(wire), 408)
    assert logged == ["closed a connection from 127.0.0.1: its request was not complete after 0.4 s"]


def test_a_line_of_each_kind_a_minute(monkeypatch):
    now, once = [0.0], OncePerMinute()
    monkeypatch.setattr("alora_kernels.serving.http.errors.time.monotonic", lambda: now[0])

    def shown(text: str, *values: object, level: int = logging.WARNING) -> str | None:
        record = logging.LogRecord("x", level, "x", 1, text, values, None)
        return record.getMessage() if once.filter(record) else None

    assert [shown("%s is late", n) for n in range(5)] == ["0 is late", None, None, None, None]
    assert shown("%s is many", 1) == "1 is many"
    assert shown("failed", level=logging.ERROR) and shown("failed", level=logging.ERROR)
    now[0] = 61.0
    assert shown("failed", level=logging.ERROR) == "failed"  # none of them was left out
    assert shown("%s is late", 9) == "9 is late; 4 more like the last such line were left out"
    now[0] = 200.0
    assert shown("%s is late", 10) == "10 is late"


def test_a_head_request_is_refused_without_a_body(engine, logged):
    with running(engine) as url, closing(connect(url)) as wire:
        wire.sendall(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")
        head, _, body = until_closed(wire).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"content-length" in head and not body
    assert logged == ["Invalid HTTP request received."]


# ------------------------------------------------------------------ heads and bodies without an end


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (b"GET /", b"a" * 1000), (b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ", b"a" * 1000),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"".join(b"X-%d: a\r\n" % n for n in range(100))),
        (b"POST /v1/completions HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n1;" % JSON, b"a" * 1000),
        (b"POST /v1/completions HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n0\r\n" % JSON, b"X-A: a\r\n" * 100),
    ],
)  # fmt: skip
def test_what_comes_without_an_end_is_cut_off(engine, begun, more):
    """Whatever uvicorn would choose to read with: it would be httptools here where that is installed."""
    with running(engine, ServerConfig("tiny", api_keys=("key",))) as url, closing(connect(url)) as wire:
        wire.sendall(begun)
        sent = 0
        with suppress(ConnectionError):
            while sent < 64 << 20:
                wire.sendall(more)
                sent += len(more)
        assert sent < 16 << 20  # what the kernel holds, no more
        assert httpx.get(url + "/health").status_code == 200


@pytest.mark.parametrize(
    "head", [b"X-A: " + b"a" * (33 << 10) + b"\r\n", b"".join(b"X-%d: a\r\n" % n for n in range(100)), b""]
)
@pytest.mark.parametrize("whole", [False, True])
def test_the_head_of_a_request_is_bounded(engine, logged, head, whole):
    """In bytes and in fields, and refused before a key is asked for."""
    path = b"/" + (b"a" * (33 << 10) if not head else b"")
    with running(engine, ServerConfig("tiny", request_timeout=1)) as url, closing(connect(url)) as wire:
        wire.sendall(b"GET %s HTTP/1.1\r\nHost: localhost\r\n%s%s" % (path, head, b"\r\n" if whole else b""))
        if not whole and len(head) < 9000 and head:
            error(until_closed(wire), 408)  # not complete, and not too long yet
        elif whole:
            wire.settimeout(5)
            assert wire.recv(1 << 16).startswith(b"HTTP/1.1 431")
        else:
            assert error(until_closed(wire), 431)["code"] == "headers_too_long"


def test_no_http_is_refused_in_one_shape_and_one_line(engine, logged):
    with running(engine) as url:
        for _ in range(5):
            with closing(connect(url)) as wire:
                wire.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n")
                assert error(until_closed(wire), 400)["code"] == "invalid_http"
    assert logged == ["Invalid HTTP request received."]


def test_what_comes_after_an_early_answer_cannot_fail_the_server(engine, caplog):
    """A chunk that is none, after the answer to its request was given."""
    with running(engine, ServerConfig("tiny", max_body_bytes=10)) as url, closing(connect(url)) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\n%sTransfer-Encoding: chunked\r\n\r\n" % JSON)
        wire.sendall(b"14\r\n" + b" " * 20 + b"\r\n")
        assert wire.recv(1 << 16).startswith(b"HTTP/1.1 413")
        wire.sendall(b"zz\r\n")
        assert until_closed(wire) == b""
    assert not caplog.records  # of asyncio, with a traceback


# ------------------------------------------------------------------ too many


def settled(url: str, source: str = "127.0.0.1") -> httpx.Response:
    """The answer of /health as soon as a connection is taken again."""
    transport = httpx.HTTPTransport(local_address=source)
    for _ in range(300):
        with httpx.Client(transport=transport) as client, suppress(httpx.TransportError):
            if (answer := client.get(url + "/health")).status_code not in (429, 503):
                return answer
        transport = httpx.HTTPTransport(local_address=source)
        time.sleep(0.02)
    raise AssertionError("no connection is taken any more")


@pytest.mark.parametrize(
    ("limits", "source", "status"),
    [
        ({"max_connections": 3}, "127.0.0.2", 503),
        ({"max_connections_per_address": 3}, "127.0.0.1", 429),
        ({"max_connections_per_address": 3}, "127.0.0.2", 200),
        ({"max_connections_per_address": 3, "trusted_proxies": ("127.0.0.1",)}, "127.0.0.1", 200),
    ],
)
def test_open_connections_are_limited_in_all_and_per_address(engine, logged, limits, source, status):
    with running(engine, ServerConfig("tiny", **limits)) as url:
        with ExitStack() as open_ones:
            for _ in range(3):
                wire = open_ones.enter_context(closing(connect(url)))
                wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert wire.recv(1 << 16).startswith(b"HTTP/1.1 200")
            for _ in range(3):
                with closing(connect(url, source)) as one_more:
                    if status == 200:
                        one_more.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                        assert one_more.recv(1 << 16).startswith(b"HTTP/1.1 200")
                    else:
                        answer = until_closed(one_more)
                        assert error(answer, status)["code"] == "too_many_connections"
                        assert b"retry-after: 1" in answer.lower()
        assert len(logged) == (status != 200)
        assert settled(url, source).status_code == 200


def test_requests_of_one_address_behind_a_proxy_are_limited(engine):
    """A proxy's connections are those of many clients."""
    config = ServerConfig("tiny", max_connections_per_address=2, trusted_proxies=("127.0.0.1",))
    engine.hold()
    with running(engine, config) as url, ExitStack() as open_ones:
        wires = [open_ones.enter_context(closing(connect(url))) for _ in range(4)]
        for n, address in enumerate((b"192.0.2.1", b"192.0.2.2", b"192.0.2.1"), 1):
            wires[n].sendall(post(ASK, b"X-Forwarded-For: %s\r\n" % address))
            while engine.stats().running < n:
                time.sleep(0.01)
        wires[0].sendall(post(ASK, b"X-Forwarded-For: 192.0.2.1\r\n"))
        assert wires[0].recv(1 << 16).startswith(b"HTTP/1.1 429")
        engine.go()
        assert all(wire.recv(1 << 16).startswith(b"HTTP/1.1 200") for wire in wires[1:])
        answer, end = b"HTTP/1.1 429", time.monotonic() + 30
        while answer.startswith(b"HTTP/1.1 429") and time.monotonic() < end:  # those answered are about to be forgotten
            wires[0].sendall(post(ASK, b"X-Forwarded-For: 192.0.2.1\r\n"))
            answer = wires[0].recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200")


def test_a_thousand_streams_of_one_client_are_all_answered(logged):
    sizes = EngineConfig(max_batch=64, max_waiting=1000, max_context=64)
    request = post(ASK | {"stream": True, "max_tokens": 2}, b"Connection: close\r\n")

    async def stream(url: str, together: asyncio.Barrier) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
        await together.wait()
        writer.write(request)
        with closing(writer):
            return await reader.read()

    async def streams(url: str) -> list[bytes]:
        together = asyncio.Barrier(1000)
        return await asyncio.gather(*(stream(url, together) for _ in range(1000)))

    with FakeEngine(config=sizes) as engine, running(engine) as url:
        answers = asyncio.run(streams(url))
    assert all(b"movie1 " in answer and answer.endswith(b"[DONE]\n\n\r\n0\r\n\r\n") for answer in answers)
    assert not logged


def test_where_fewer_files_may_be_open_fewer_connections_are_taken(monkeypatch, logged):
    resource = pytest.importorskip("resource")
    raised = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: raised.append(limits))
    for limits, most, after in (
        ((1024, 1 << 20), 4096, (4352, 1 << 20)),
        ((1024, resource.RLIM_INFINITY), 4096, (4352, resource.RLIM_INFINITY)),
        ((256, 1000), 744, (1000, 1000)),
        ((1 << 20, 1 << 20), 4096, None),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), 4096, None),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=limits: limits)
        assert connections.Connections(ServerConfig("tiny")).most == most
        assert (raised.pop() if raised else None) == after
    assert logged == ["at most 744 connections, not 4096: raise the limit of open files (ulimit -n)"]


# ------------------------------------------------------------------ clients that do not read


def long_answers() -> dict:
    """Eight answers, each of which repeats a long prompt: far more than the kernel holds for a client."""
    return {"model": "movie", "prompt": "x" * 900_000, "n": 8, "stream": True, "max_tokens": 60}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_does_not_read_is_ended_and_holds_up_nobody(logged, stream):
    config = ServerConfig("tiny", send_timeout=LATE)
    with (
        FakeEngine(echo=True, words=10**6, delay=0.005) as engine,
        running(engine, config) as url,
        closing(connect(url, window=4096)) as wire,
    ):
        wire.sendall(post(long_answers() | {"stream": stream}))
        assert httpx.post(url + "/v1/completions", json=ASK | {"model": "spam"}).status_code == 200
        end = time.monotonic() + 30
        while not logged and time.monotonic() < end:
            time.sleep(0.02)
        assert logged == ["closed a connection from 127.0.0.1: it took nothing of its answer for 0.4 s"]
        assert engine.idle()
        assert len(until_closed(wire)) < 1 << 20  # of 7 MiB


def test_a_client_that_reads_slowly_gets_all_of_its_answer(logged):
    config = ServerConfig("tiny", send_timeout=LATE)
    with FakeEngine(echo=True) as engine, running(engine, config) as url, closing(connect(url, window=4096)) as wire:
        fields = long_answers() | {"n": 4}
        wire.sendall(post(fields, b"Connection: close\r\n"))
        got, end = bytearray(), time.monotonic() + 4 * LATE
        while piece := wire.recv(1 << 14):
            got += piece
            if time.monotonic() < end:
                time.sleep(0.05)
        assert got.count(b"x" * 900_000) == 4 and got.endswith(b"0\r\n\r\n")
    assert not logged
