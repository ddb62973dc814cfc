"""Processes are supervised: nothing is left behind, and every failure quotes its log."""

from __future__ import annotations

import os
import signal
import socket
import sys

import psutil
import pytest

from alora_kernels.federated.deploy import processes as module
from alora_kernels.federated.deploy import runs
from alora_kernels.federated.deploy.processes import FlowerError, Process, Processes
from tests.support.processes import wait, wait_line

FOREVER = [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(600)"]


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


def two(processes: Processes) -> list[Process]:
    """Two children that are running."""
    children = [processes.start(name, FOREVER, os.environ) for name in ("first", "second")]
    for child in children:
        wait_line(child, "ready", 120)
    return children


def test_everything_is_stopped_in_reverse_order_after_an_error(tmp_path, monkeypatch):
    order, stop = [], Process.stop
    monkeypatch.setattr(Process, "stop", lambda self, grace: (order.append(self.name), stop(self, grace)))
    with pytest.raises(ZeroDivisionError), Processes(tmp_path) as processes:
        children = two(processes)
        raise ZeroDivisionError
    assert order == ["second", "first"]
    assert [child.exit_code for child in children] == [-signal.SIGTERM] * 2


def test_asked_twice_it_loses_patience_and_still_stops_everything(tmp_path):
    with Processes(tmp_path) as processes:
        children = two(processes)
        asked, stop = [], children[1].stop

        def interrupted(grace: float) -> None:
            asked.append(grace)
            if len(asked) == 1:
                raise KeyboardInterrupt
            stop(grace)

        children[1].stop = interrupted  # type: ignore[method-assign]
    assert asked == [module.GRACE, 0.0]
    assert None not in [child.exit_code for child in children]


def test_a_process_that_ignores_sigterm_is_killed_with_its_detached_children(tmp_path):
    code = python(
        "import signal, subprocess, sys, time",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)",
        "print(child.pid, flush=True)",
        "print('ready', flush=True)",
        "time.sleep(600)",
    )
    process = Process("stubborn", code, os.environ, tmp_path / "log")
    wait_line(process, "ready", 120)
    child = psutil.Process(int(process.log.read_text().split()[0]))
    process.stop(grace=0.5)
    assert process.exit_code == -signal.SIGKILL
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_sigterm_to_the_supervisor_stops_its_processes(tmp_path):
    code = python(
        "import os, sys, time; from pathlib import Path",
        "from alora_kernels.federated.deploy.processes import Processes",
        f"with Processes(Path({str(tmp_path)!r})) as processes:",
        f"    print(processes.start('child', {FOREVER!r}, os.environ).pid, flush=True)",
        "    time.sleep(600)",
    )
    supervisor = Process("supervisor", code, os.environ, tmp_path / "log")
    wait_line(supervisor, "\n", 240)
    child = int(supervisor.log.read_text())
    os.kill(supervisor.pid, signal.SIGTERM)
    assert wait(supervisor, 120) == 128 + signal.SIGTERM
    assert not psutil.pid_exists(child)


def test_a_daemon_that_ends_or_stays_silent_is_an_error_that_quotes_its_log(tmp_path):
    url = f"http://127.0.0.1:{module.free_port()}/health"
    ends = Process(
        "ends", python("print('\\x1b[91mthe reason\\x1b[0m')", "raise SystemExit(3)"), os.environ, tmp_path / "a"
    )
    with pytest.raises(FlowerError, match=r"(?s)ends ended with exit code 3.*  the reason$"):
        module.wait_healthy(ends, url, seconds=120)
    with pytest.raises(FlowerError, match="ends ended with exit code 3"):
        wait_line(ends, "never", 120)
    silent = Process("silent", FOREVER, os.environ, tmp_path / "b")
    try:
        with pytest.raises(FlowerError, match="silent does not answer"):
            module.wait_healthy(silent, url, seconds=1)
        with pytest.raises(FlowerError, match="silent still runs after 0 s"):
            module.follow(silent, None, 0.3)
    finally:
        silent.stop()


def test_a_program_that_does_not_exist(tmp_path):
    with pytest.raises(FlowerError, match="ghost does not start"):
        Process("ghost", [str(tmp_path / "nothing")], os.environ, tmp_path / "log")


def test_a_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FlowerError, match=f"port {port} on 127.0.0.1 cannot be used"), Processes(tmp_path) as ps:
            runs.start_superlink(ps, tmp_path, port=port)
    module.check_port("127.0.0.1", port)


def test_follow_passes_on_every_line_once(tmp_path):
    code = python("import time", "for i in range(5):", "    print('line', i, flush=True); time.sleep(0.15)")
    seen: list[str] = []
    assert module.follow(Process("lines", code, os.environ, tmp_path / "log"), seen.append, 120) == 0
    assert seen == [f"line {i}" for i in range(5)]


def test_follow_waits_for_the_rest_of_a_character(tmp_path):
    write = "sys.stdout.buffer.write({!r}); sys.stdout.flush()"
    halves = write.format(b"caf\xc3"), "time.sleep(3 * 0.2)", write.format(b"\xa9 open\nlast")
    seen: list[str] = []
    process = Process("halves", python("import sys, time", *halves), os.environ, tmp_path / "log")
    assert module.follow(process, seen.append, 120) == 0
    assert seen == ["caf\u00e9 open"]


@pytest.mark.parametrize(("said", "remedy"), runs.REMEDIES.items())
def test_a_client_that_ends_says_what_to_do(tmp_path, said, remedy):
    with pytest.raises(FlowerError) as raised:
        runs.run_client("clinic", python(f"print({said!r}); raise SystemExit(1)"), tmp_path, patience=0)
    assert str(raised.value).startswith(f"clinic ended with exit code 1: {remedy}\n")
    assert said in str(raised.value)


def test_a_refused_client_tries_again_and_every_line_is_passed_on_once(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "AGAIN", 0.05)
    tries = tmp_path / "tries"
    code = python(
        "from pathlib import Path",
        f"file = Path({str(tries)!r}); n = len(file.read_text()) if file.exists() else 0",
        "file.write_text('x' * (n + 1))",
        f"print('try', n); print({runs.REFUSED!r} if n < 2 else 'another reason'); raise SystemExit(1)",
    )
    seen: list[str] = []
    with pytest.raises(FlowerError, match="another reason"):
        runs.run_client("clinic", code, tmp_path, echo=seen.append, patience=60)
    assert seen == ["try 0", runs.REFUSED, "try 1", runs.REFUSED, "try 2", "another reason"]
