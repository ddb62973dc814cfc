"""Child processes that end when the work ends: what `runs` starts of Flower, supervised, with logs that errors quote.

Every process leads its own group, so Ctrl-C in a terminal reaches only the supervisor. A Flower daemon detaches what it
starts (executor, app, Ray), and those look only every few seconds whether their parent lives: so the whole tree is
listed before its root is stopped, and then ended with it.
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

GRACE = 10.0  # seconds between SIGTERM and SIGKILL: a SuperLink gives its executor one, a SuperNode signs off in two
PROBE = 0.2  # seconds between two looks at a process
LAST = 12  # lines of a log that an error quotes
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class FlowerError(RuntimeError):
    """Flower, or a process around it, did not do what was asked; the message ends with the last lines of its log."""


def free_port() -> int:
    """A TCP port of this machine nobody listens on; another program may still take it before it is used."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(host: str, port: int) -> None:
    """A FlowerError for a port on which somebody listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a closed connection's wait is no reason to refuse
        try:
            probe.bind((host, port))
        except OSError as error:
            raise FlowerError(f"port {port} on {host} cannot be used: {error.strerror}; choose another port") from None


def last_lines(log: Path, lines: int = LAST) -> str:
    """The end of a log, indented, without colours and empty lines."""
    text = _COLOUR.sub("", log.read_text(errors="replace")) if log.exists() else ""
    kept = [line for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(f"  {line}" for line in kept) or "  (empty log)"


class Process:
    """One child process; `env` is its whole environment, its output and errors are appended to `log`."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._begin = log.stat().st_size if log.exists() else 0  # an earlier process wrote what is before
        try:
            with log.open("ab") as sink:
                self._popen = subprocess.Popen(
                    list(command),
                    env=dict(env),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise FlowerError(f"{name} does not start: {error}") from error
        self.pid = self._popen.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    def open_log(self) -> IO[str]:
        """Its log, from where this process began."""
        stream = self.log.open(errors="replace")
        stream.seek(self._begin)
        return stream

    def looks(self, seconds: float | None) -> Iterator[int | None]:
        """Its exit code every PROBE seconds: None while it runs, the number once, then a FlowerError."""
        begin = time.monotonic()
        while seconds is None or time.monotonic() - begin <= seconds:
            code = self.exit_code
            yield code
            if code is not None:
                raise FlowerError(f"{self.name} ended with exit code {code}:\n{last_lines(self.log)}")
            time.sleep(PROBE)

    def stop(self, grace: float = GRACE) -> None:
        """SIGTERM to it, then to its descendants, then SIGKILL to what is left after `grace` seconds."""
        family = []
        if self.exit_code is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(self.pid).children(recursive=True)
            self._popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(grace)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, left = psutil.wait_procs(family, timeout=grace)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._popen.kill()
        psutil.wait_procs(left, timeout=grace)
        self._popen.wait()


class Processes:
    """A context that stops everything started in it, in reverse order, also after an error, Ctrl-C or SIGTERM."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._started: list[Process] = []
        self._before: Callable[[int, FrameType | None], object] | int | None = None

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> Process:
        """A process that logs to `<logs>/<name>.log`."""
        process = Process(name, command, env, self.logs / f"{name}.log")
        self._started.append(process)
        return process

    def __enter__(self) -> Processes:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, _leave)
        return self

    def __exit__(self, *error: object) -> None:
        grace = GRACE
        try:
            for process in reversed(self._started):
                try:
                    process.stop(grace)
                except (KeyboardInterrupt, SystemExit):  # asked again: no more patience, and still nothing left behind
                    grace = 0.0
                    process.stop(grace)
        finally:
            if self._before is not None:
                signal.signal(signal.SIGTERM, self._before)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def wait_healthy(process: Process, url: str, ca: Path | None = None, seconds: float = 60.0) -> None:
    """Wait until a daemon answers at its health address (https: proven by `ca`); else a FlowerError quotes its log."""
    context = ssl.create_default_context(cafile=str(ca)) if ca else None
    reason = "no answer"
    for code in process.looks(seconds):
        if code is not None:
            continue  # somebody else would answer
        try:
            with urllib.request.urlopen(url, timeout=5, context=context):
                return
        except OSError as error:  # URLError among them
            reason = str(getattr(error, "reason", error))
            if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                raise FlowerError(f"the certificate of {process.name} does not hold for {url}: {reason}") from None
    raise FlowerError(
        f"{process.name} does not answer at {url} after {seconds:.0f} s ({reason}):\n{last_lines(process.log)}"
    )


def follow(process: Process, echo: Callable[[str], object] | None, seconds: float | None) -> int:
    """Pass on a process's log line by line until it ends with this exit code; a FlowerError after `seconds`."""
    with process.open_log() as log:
        for code in process.looks(seconds):
            at = log.tell()
            while (line := log.readline()).endswith("\n"):
                at = log.tell()
                if echo:
                    echo(line[:-1])
            log.seek(at)  # half a line is read again when it is whole: it may end within a character
            if code is not None:
                return code
    raise FlowerError(f"{process.name} still runs after {seconds:.0f} s:\n{last_lines(process.log)}")
