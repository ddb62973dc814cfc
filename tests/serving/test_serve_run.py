"""How the HTTP server begins and ends: settings, the port, signals and what becomes of the answers that run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from test_serve_http import ASK

from alora_kernels.serving.http import ServerConfig, bind

HERE = Path(__file__).parent
SERVER = """
import sys
from enginefakes import FakeEngine
from alora_kernels.serving.http import ServerConfig, bind, serve
engine = FakeEngine(words=10**6, delay=float(sys.argv[1])).start()
bound = bind("127.0.0.1", 0)
print(bound.getsockname()[1], flush=True)
code = serve(engine, ServerConfig("tiny", drain_timeout=float(sys.argv[2])), bound)
print("tidied up", engine.state, flush=True)
sys.exit(code)
"""


@pytest.fixture
def process():
    started = []

    def start(delay: float, drain_timeout: float) -> tuple[subprocess.Popen, str]:
        paths = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
        child = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(delay), str(drain_timeout)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        started.append(child)
        assert child.stdout is not None
        url = f"http://127.0.0.1:{child.stdout.readline().strip()}"
        for _ in range(2400):
            try:
                httpx.get(url + "/health")
                return child, url
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server did not start")

    yield start
    for child in started:
        child.kill()
        child.communicate()


def ask_slowly(url: str, then) -> str:
    """Stream an answer of 50 words, and do something after the first."""
    fields = ASK | {"stream": True, "max_tokens": 50}
    with httpx.stream("POST", url + "/v1/completions", json=fields, timeout=60) as response:
        lines = response.iter_lines()
        first = next(lines)
        then()
        return "\n".join([first, *lines])


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(process):
    child, url = process(0.1, 60)
    seen = []

    def drain() -> None:
        child.send_signal(signal.SIGTERM)
        end = time.monotonic() + 60
        while httpx.get(url + "/health").status_code == 200 and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(httpx.get(url + "/health").json())
        seen.append(httpx.post(url + "/v1/completions", json=ASK).status_code)

    text = ask_slowly(url, drain)
    assert seen == [{"status": "draining"}, 503]
    assert '"finish_reason":"length"' in text and text.rstrip().endswith("data: [DONE]")
    assert child.wait(60) == 0
    assert child.stdout.read().strip() == "tidied up stopped"


def test_what_outlasts_the_drain_is_cut_off_and_told(process):
    child, url = process(0.2, 0.3)
    text = ask_slowly(url, lambda: child.send_signal(signal.SIGTERM))
    assert "the server ended this answer before it was complete" in text and text.rstrip().endswith("data: [DONE]")
    assert child.wait(60) == 1


def test_a_second_signal_cuts_off_at_once(process):
    child, url = process(2.0, 600)

    def twice() -> None:
        child.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)

    assert "the server ended this answer before it was complete" in ask_slowly(url, twice)
    assert child.wait(60) == 1  # the answer alone would take 100 s
    assert child.stdout.read().strip() == "tidied up stopped"


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"base_model_id": ""}, "base_model_id"), ({"port": 70000}, "port"), ({"api_keys": ("",)}, "api_keys"),
        ({"api_keys": "secret"}, "api_keys"), ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"rate_limit": "many"}, "60/minute"), ({"adapter_roots": (Path("/no/such"),)}, "/no/such"),
        ({"drain_timeout": -1}, "drain_timeout"), ({"request_timeout": 0}, "request_timeout"),
        ({"send_timeout": float("nan")}, "send_timeout"), ({"max_connections": 0}, "max_connections"),
        ({"max_connections_per_address": 0}, "max_connections_per_address"),
        ({"wrong_key_limit": "some"}, "wrong_key_limit"), ({"wrong_key_limit": ""}, "wrong_key_limit"),
        ({"trusted_proxies": ("*",)}, "trusted_proxies"), ({"trusted_proxies": ("10.0.0.1/8",)}, "host bits"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings_, named):
    with pytest.raises(ValueError, match=named):
        ServerConfig(**({"base_model_id": "tiny"} | settings_))


def test_a_taken_port_and_a_foreign_host_are_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"127\.0\.0\.1:{port}.*choose another"):
            bind("127.0.0.1", port)
    with pytest.raises(ValueError, match=r"192\.0\.2\.1"):
        bind("192.0.2.1", 0)
    with pytest.raises(ValueError, match="host"):
        bind("no such host", 0)
