"""What the HTTP server lets in: keys, rates, hosts, sizes, JSON, fields; and that no body makes it fail."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import httpx
import pytest
from enginefakes import FakeEngine
from httpserver import running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_serve_http import ASK, asker, call, post, refused

from alora_kernels.serving.http import ServerConfig, create_app
from alora_kernels.serving.http.security import address_of, is_loopback

JSON = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"


def send(engine, content: bytes, path: str = "/v1/completions", config: ServerConfig | None = None) -> httpx.Response:
    return call(engine, "POST", path, config, content=content, headers=JSON)


# ------------------------------------------------------------------ keys


def test_every_route_but_the_page_and_health_needs_a_key(engine):
    config = ServerConfig("tiny", api_keys=("one", "zwei-ß", "voilà"))
    app = create_app(engine, config)
    app.add_api_route("/new", lambda: "open", methods=["GET"])  # closed until somebody opens it
    routes = [("GET", "/v1/models"), ("GET", "/stats"), ("GET", "/metrics"), ("GET", "/new"), ("GET", "/nothing")]
    routes += [("POST", path) for path in ("/v1/completions", CHAT, "/v1/load_lora_adapter")]
    ask = asker(app)
    for method, path in routes:
        answer = ask(method, path)
        error = refused(answer, 401, "Authorization: Bearer")
        assert error["code"] == "invalid_api_key" and answer.headers["www-authenticate"] == "Bearer"
    assert ask("GET", "/health").status_code == 200
    for key in (b"one", "zwei-ß".encode(), "voilà".encode()):
        assert ask("GET", "/v1/models", headers={b"Authorization": b"Bearer " + key}).status_code == 200
    for wrong in ("Bearer on", "Bearer oneone", "Bearer", "Basic one", "one", "Bearer \xff"):
        refused(ask("GET", "/v1/models", headers={b"authorization": wrong.encode("latin-1")}), 401)


def test_an_address_that_tries_keys_is_stopped_and_those_that_live_there_are_not(engine):
    """A right key that is new there is stopped too: it would tell a guesser that it was right."""
    config = ServerConfig("tiny", api_keys=("right", "other"), wrong_key_limit="3/hour")
    app = create_app(engine, config)

    def status(key: str | None, address: str = "192.0.2.1", path: str = "/v1/models") -> httpx.Response:
        return asker(app, address)("GET", path, headers={"Authorization": f"Bearer {key}"} if key else {})

    assert status("right").status_code == 200
    for _ in range(9):  # none is no guess, and one that is repeated is one
        assert status("old").status_code == status(None).status_code == status("").status_code == 401
    assert status("b").status_code == status("c").status_code == 401
    over = status("d")
    assert refused(over, 429, "wrong keys: more than 3 per 1 hour")["code"] == "rate_limit_exceeded"
    assert 3500 < int(over.headers["retry-after"]) <= 3600
    assert [status(key).status_code for key in ("right", "other", "old", None)] == [200, 429, 429, 401]
    assert status("d", path="/health").status_code == 200
    assert status("other", "192.0.2.2").status_code == 200 and status("e", "192.0.2.2").status_code == 401


def test_half_of_an_ipv6_address_is_its_owners_to_choose():
    assert address_of("192.0.2.1") == "192.0.2.1" and address_of("x" * 100) == "x" * 64
    assert address_of("2001:db8:1:2:3::4") == address_of("2001:db8:1:2:ffff::") == "2001:0db8:0001:0002::/64"
    assert address_of("fe80::1%eth0") == "fe80:0000:0000:0000::/64" != address_of("2001:db8:1:3::")


# ------------------------------------------------------------------ rates and hosts


def test_a_rate_counts_posts_of_each_key(engine):
    ask = asker(create_app(engine, ServerConfig("tiny", api_keys=("a", "b"), rate_limit="2/hour")))

    def status(key: str, method: str = "POST", path: str = "/v1/completions") -> httpx.Response:
        return ask(method, path, json=ASK, headers={"Authorization": f"Bearer {key}"})

    assert [status("a").status_code for _ in range(2)] == [200, 200]
    over = status("a")
    assert refused(over, 429, "2 per 1 hour")["code"] == "rate_limit_exceeded"
    assert 3500 < int(over.headers["retry-after"]) <= 3600
    assert status("b").status_code == 200  # another key has its own
    assert status("a", "GET", "/stats").status_code == 200  # looking is free


def test_without_keys_a_rate_counts_the_clients_address(engine):
    ask = asker(create_app(engine, ServerConfig("tiny", rate_limit="1/hour")))
    assert ask("POST", "/v1/completions", json=ASK).status_code == 200
    assert ask("POST", "/v1/completions", json=ASK, headers={"X-Forwarded-For": "1.2.3.4"}).status_code == 429


@pytest.mark.parametrize(
    ("trusted", "peer", "forwarded", "counted"),
    [
        ((), "192.0.2.9", ["192.0.2.1"], "192.0.2.9"),
        (("192.0.2.9",), "192.0.2.8", ["192.0.2.1"], "192.0.2.8"),
        (("192.0.2.9",), "192.0.2.9", ["192.0.2.1"], "192.0.2.1"),
        (("192.0.2.9",), "192.0.2.9", ["198.51.100.1, 192.0.2.1"], "192.0.2.1"),  # what the client wrote comes first
        (("192.0.2.9",), "192.0.2.9", ["198.51.100.1", "192.0.2.1"], "192.0.2.1"),
        (("192.0.2.0/28", "10.0.0.0/8"), "192.0.2.9", ["192.0.2.77, 10.1.2.3"], "192.0.2.77"),  # of two proxies
        (("192.0.2.9",), "192.0.2.9", [], "192.0.2.9"),
        (("192.0.2.9",), "192.0.2.9", [", ,"], "192.0.2.9"),
        (("2001:db8::/32",), "2001:db8::1", ["[2001:db9::7]:99"], "2001:0db9:0000:0000::/64"),
    ],
)
def test_a_trusted_proxy_alone_says_whom_limits_count(engine, trusted, peer, forwarded, counted):
    config = ServerConfig("tiny", api_keys=("key",), wrong_key_limit="1/hour", trusted_proxies=trusted)
    app = create_app(engine, config)
    said = [("X-Forwarded-For", value) for value in forwarded]
    ask = asker(app, peer)
    assert ask("GET", "/stats", headers=[*said, ("Authorization", "Bearer a")]).status_code == 401
    assert ask("GET", "/stats", headers=[*said, ("Authorization", "Bearer b")]).status_code == 429
    key = {"Authorization": "Bearer key"}
    assert asker(app, counted.replace("::/64", ":1:2:3:4"))("GET", "/stats", headers=key).status_code == 429
    assert asker(app, "203.0.113.5")("GET", "/stats", headers=key).status_code == 200


def test_only_named_hosts_are_answered(engine):
    config = ServerConfig("tiny", allowed_hosts=("localhost", "127.0.0.1", "::1"))
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000", "[::1]"):
        assert call(engine, "GET", "/health", config, headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""):
        refused(call(engine, "GET", "/v1/models", config, headers={"Host": host}), 403, "localhost")


def test_what_is_loopback():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.3.2.1", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))


# ------------------------------------------------------------------ sizes and JSON


def test_a_body_that_is_too_long_is_413_with_or_without_a_length(engine):
    config = ServerConfig("tiny", max_body_bytes=200)
    long = json.dumps(ASK | {"prompt": "x" * 200}).encode()
    refused(send(engine, long, config=config), 413, "200 bytes")
    pulled = []

    async def chunks():
        for _ in range(1000):
            pulled.append(1)
            yield b" " * 50

    refused(call(engine, "POST", "/v1/completions", config, content=chunks(), headers=JSON), 413)
    assert send(engine, json.dumps(ASK).encode(), config=config).status_code == 200


def test_a_chunked_body_over_a_socket_is_cut_at_the_limit(engine):
    with running(engine, ServerConfig("tiny", max_body_bytes=1000)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as wire:
            wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            wire.sendall(b"Transfer-Encoding: chunked\r\n\r\n" + b"3e8\r\n" + b" " * 1000 + b"\r\n")
            time.sleep(0.1)
            wire.sendall(b"1\r\n \r\n")  # and no end
            assert wire.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_408(engine):
    config = ServerConfig("tiny", request_timeout=0.1)

    async def slow():
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    started = time.monotonic()
    refused(call(engine, "POST", "/v1/completions", config, content=slow(), headers=JSON), 408)
    assert time.monotonic() - started < 4.5


def test_only_json_is_read(engine):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(call(engine, "POST", "/v1/completions", content=b"{}", headers={"Content-Type": kind}), 415)
    told = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert call(engine, "POST", "/v1/completions", content=json.dumps(ASK).encode(), headers=told).status_code == 200


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b'{"model": "\\ud800"}',
     b'{"model":"movie","prompt":"x","temperature":NaN}', b'{"model":"movie","prompt":"x","temperature":-Infinity}',
     b'{"model":"movie","prompt":"x","temperature":1e999}',
     b'{"model":"movie","prompt":"x","seed":' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_json_that_is_not(engine, content):
    refused(send(engine, content), 400)
    refused(send(engine, content, CHAT), 400)


# ------------------------------------------------------------------ fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -3}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"), ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"), ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"), ({"seed": 2**63 - 1, "n": 2}, "seed"),
        ({"stop": ""}, "stop"), ({"stop": ["a"] * 5}, "stop"), ({"stop": ["a"] * 65}, "stop"), ({"stop": 3}, "stop"),
        ({"stop": [3]}, "stop.0"), ({"stream": "yes"}, "stream"), ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"model": 3}, "model"),
        ({"prompt": []}, "prompt"), ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"), ({"prompt": {}}, "prompt"), ({"prompt": None}, "prompt"),
        ({"prompt": [True]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [1.0]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": "x " * 64}, "prompt"),
        ({"prompt": [10**30]}, "prompt"), ({"prompt": [5000]}, "prompt"), ({"tools": [{}]}, "tools"),
        ({"temprature": 1}, "temprature"), ({"messages": []}, "messages"),
    ],
)  # fmt: skip
def test_a_field_at_fault_is_named(engine, fields, param):
    error = refused(post(engine, **(ASK | fields)), 400)
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert not engine.submitted or engine.idle()


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "user", "content": [3]}, "messages.0.content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages.0.tool_calls"),
        (3, "messages.0"),
    ],
)
def test_a_message_at_fault_is_named(engine, message, param):
    assert refused(post(engine, CHAT, model="movie", messages=[message]), 400)["param"] == param


def test_a_missing_field_is_named_and_messages_are_needed(engine):
    assert refused(post(engine, model="movie"), 400, "prompt")["param"] == "prompt"
    assert refused(post(engine, prompt="x"), 400, "model")["param"] == "model"
    assert refused(post(engine, CHAT, model="movie", messages=[]), 400)["param"] == "messages"
    assert refused(post(engine, CHAT, model="movie", messages=[{}] * 1025), 400)["param"].startswith("messages")


# ------------------------------------------------------------------ anything at all

NAMES = ["model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "stop",
         "seed", "n", "stream", "stream_options", "logprobs", "tools", "echo", "user", "lora_name", "lora_path",
         "task"]  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.integers(-2, 70) | st.floats() | st.text(max_size=20)
    | st.sampled_from(["movie", "tiny", "boom", "user", "text", "..", "~", "\0", 10**400, -(2**63), 1e308])
)  # fmt: skip
KEYS = st.sampled_from(["role", "content", "type", "text", "include_usage"]) | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text() | ANYTHING}),
    min_size=1, max_size=3,
)  # fmt: skip
BODIES = st.builds(
    lambda good, wild: {**good, **wild},
    st.fixed_dictionaries({"model": st.just("movie")}, optional={"prompt": st.text() | ANYTHING, "messages": MESSAGES}),
    st.dictionaries(st.sampled_from(NAMES), ANYTHING, max_size=3),
)
PATHS = ["/v1/completions", CHAT, "/v1/load_lora_adapter", "/v1/unload_lora_adapter"]


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), fields=BODIES | ANYTHING, raw=st.none() | st.binary(max_size=30))
def test_no_body_makes_the_server_fail(tmp_path_factory, path, fields, raw):
    roots = (tmp_path_factory.getbasetemp(),)
    with FakeEngine() as engine:
        config = ServerConfig("tiny", adapter_roots=roots)
        content = raw if raw is not None else json.dumps(fields).encode()
        answer = send(engine, content, path, config)
        if answer.status_code == 500 and answer.json()["error"]["code"] == "generation_failed":
            return  # a prompt said "boom"
        assert answer.status_code < 500, (content, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert engine.idle()
