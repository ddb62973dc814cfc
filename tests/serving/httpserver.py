"""A real HTTP server in a thread, on a free port of this machine: our application around an engine, real or fake.

A client that keeps its connection open holds the end up for one second, not longer.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

STARTING, ENDING = 30.0, 20.0  # seconds


@contextmanager
def running(engine: Any, config: Any = None) -> Iterator[str]:
    """The address, without a slash at the end, of a server around an engine that was started.

    `config` is a `ServerConfig`, or the base is called tiny. A server that does not start or end is an error.
    """
    from alora_kernels.serving.http import ServerConfig
    from alora_kernels.serving.http.app import settings

    with_ours = settings(engine, config or ServerConfig("tiny"))
    with_ours.timeout_graceful_shutdown = 1
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(with_ours)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        end = time.monotonic() + STARTING
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the server did not start"
            time.sleep(0.01)
        try:
            yield "http://127.0.0.1:{1}".format(*bound.getsockname())
        finally:
            server.should_exit = True
            thread.join(ENDING)
            assert not thread.is_alive(), "the server did not end"
