"""Run an app folder with Flower as processes: a simulation on this machine, or a server and clients on several.

`flwr run` exits 0 when the run crashed, so a run counts as done only when the SuperLink says `finished:completed`;
`flwr run . local` leaves a SuperLink behind on a fixed port, so a simulation has its own as a child on a free one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...text import install
from . import commands
from .commands import CONNECTION, LOOPBACK, Certificates
from .processes import LAST, FlowerError, Process, Processes, check_port, follow, free_port, last_lines, wait_healthy

COMPLETED = "finished:completed"
CLI_SECONDS = 120.0  # for a `flwr` command that does not follow a run
KNOWN_KEY = "Public key already in use"  # what a SuperLink says to a second registration
REFUSED = "Failed to activate SuperNode"  # what a SuperNode logs that the SuperLink does not take in
PATIENCE = 90.0  # seconds; a SuperLink notices after 60, two heartbeats, that a client is gone
AGAIN = 5.0  # seconds between two attempts
Echo = Callable[[str], object]

#: what a SuperNode logs -> what to do about it
REMEDIES: Mapping[str, str] = {
    REFUSED: "the server does not know this client's key (register its .pub file there), or counts an earlier process"
    " of this client as connected (for a minute after a crash)",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not signed by the ca.pem given here, has run out, or does"
    " not name the address used here",
    "Unable to parse the private key": "the key must be as `ssh-keygen -t ecdsa -b 384` writes it",
}


class AlreadyRegisteredError(FlowerError):
    """The key was registered before; nothing is left to do."""


def register(home: Path, public_key: Path, client: str) -> None:
    """Tell the SuperLink a client's public key, with which it may take part; an AlreadyRegisteredError if known."""
    key = str(commands.existing(public_key, "make_node_key"))
    try:
        _flwr(home, "supernode", "register", key, CONNECTION, "--name", commands.check_name(client))
    except FlowerError as error:
        if KNOWN_KEY in str(error):
            raise AlreadyRegisteredError(f"{public_key} is registered already") from None
        raise


def submit_and_wait(
    home: Path,
    app: Path,
    *,
    federation: Mapping[str, int | float] | None = None,
    echo: Echo | None = None,
    seconds: float | None = None,
) -> Path:
    """Start a run of an app folder and follow it to its end; gives the file of its log, whose lines `echo` gets.

    `home` is connected (`connect`) to a SuperLink; `federation` are settings of a simulation, such as
    `{"num-supernodes": 4}`. After `seconds` the run is stopped. A FlowerError, with the end of the log, if the app was
    refused or the run did not complete.
    """
    options = ["--federation-config", " ".join(f"{k}={v}" for k, v in federation.items())] if federation else []
    run_id = int(_flwr(home, "run", str(Path(app).resolve()), CONNECTION, *options)["run-id"])
    log = Path(home) / "logs" / f"run-{run_id}.log"
    command = [commands.program("flwr"), "log", str(run_id), CONNECTION, "--stream"]
    process = Process(f"run {run_id}", command, {**commands.environment(home), "PYTHONUNBUFFERED": "1"}, log)
    try:
        follow(process, echo, seconds)
    except BaseException:  # a deadline or Ctrl-C: the run must not go on alone
        with contextlib.suppress(FlowerError):  # the SuperLink is gone, and the run with it
            _flwr(home, "stop", str(run_id), CONNECTION)
        raise
    finally:
        process.stop()
    status, details = run_status(home, run_id)
    if status != COMPLETED:
        raise FlowerError(f"run {run_id} ended as {status} ({details}):\n{last_lines(log)}")
    return log


def run_status(home: Path, run_id: int) -> tuple[str, str]:
    """Status such as "running" or "finished:failed", and Flower's details."""
    answer = _flwr(home, "list", CONNECTION, "--run-id", str(run_id))
    return str(answer["runs"][0]["status"]), str(answer["runs"][0]["status-details"])


def run_ray(
    app: Path,
    num_clients: int,
    home: Path,
    *,
    cpus: int = 1,
    gpus: float = 0.0,
    echo: Echo | None = None,
    seconds: float | None = None,
) -> Path:
    """Simulate a federation on this machine with Ray and leave nothing running; the rest as `submit_and_wait`.

    Each node finds its number as `context.node_config["partition-id"]`. `home` gets database, logs and Flower's home. A
    client takes so many cores and such a share of a GPU; as many run at once as fit into the machine. A ValueError for
    no client, or no core for it; a FlowerError if Flower or Ray is missing.
    """
    if num_clients < 1 or cpus < 1 or gpus < 0:
        raise ValueError(f"num_clients and cpus must be >= 1 and gpus >= 0, got {num_clients}, {cpus}, {gpus}")
    if importlib.util.find_spec("ray") is None:
        raise FlowerError(f"ray is not installed: {install('federated')}")
    port, resources = free_port(), "client-resources-num"
    federation = {"num-supernodes": num_clients, f"{resources}-cpus": cpus, f"{resources}-gpus": float(gpus)}
    with Processes(Path(home) / "logs") as processes:
        start_superlink(processes, home, port=port)
        return submit_and_wait(home, app, federation=federation, echo=echo, seconds=seconds)


def start_superlink(
    processes: Processes, home: Path, *, host: str = LOOPBACK, port: int, certificates: Certificates | None = None
) -> Process:
    """Start a SuperLink (`superlink_command`), wait until it answers, connect the home to it; else a FlowerError."""
    command = commands.superlink_command(home, host=host, port=port, certificates=certificates)
    check_port(host, port)
    process = processes.start("superlink", command, commands.environment(home))
    near = LOOPBACK if host in ("0.0.0.0", "::") else host
    ca = certificates.ca if certificates else None
    wait_healthy(process, f"{'https' if ca else 'http'}://{near}:{port}/health", ca)
    commands.connect(home, f"{near}:{port}", ca)
    return process


def run_client(
    client: str, command: Sequence[str], home: Path, *, echo: Echo | None = None, patience: float = PATIENCE
) -> None:
    """Run a client's SuperNode (`supernode_command`) until it is stopped; logs to `<home>/logs/<client>.log`.

    A SuperLink refuses a client that it does not know, and for a minute one that crashed, because it still counts the
    dead process as connected. The SuperNode ends in both cases, so it is started again until `patience` is over. A
    FlowerError if it ended on its own: it says what to do where the log tells why.
    """
    begin = time.monotonic()
    while True:
        with Processes(Path(home) / "logs") as processes:
            process = processes.start(client, command, commands.environment(home))
            code = follow(process, echo, None)
        with process.open_log() as log:
            refused = REFUSED in log.read()
        if not refused or time.monotonic() - begin > patience:
            raise FlowerError(f"{client} ended with exit code {code}: {explain(process.log)}")
        time.sleep(AGAIN)


def explain(log: Path) -> str:
    """What to do about the failure at the end of a SuperNode's log, and the log's last lines."""
    end = last_lines(log, 2 * LAST)
    known = [remedy for said, remedy in REMEDIES.items() if said in end]
    return "\n".join([*known, last_lines(log)])


def _flwr(home: Path, *arguments: str) -> dict[str, Any]:
    """The JSON answer of a `flwr` command."""
    command = [commands.program("flwr"), *arguments, "--format", "json"]
    called = "flwr " + " ".join(arguments[:2])
    try:
        env = commands.environment(home)
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CLI_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise FlowerError(f"{called} does not answer after {CLI_SECONDS:.0f} s") from None
    found = re.search(r"^\{.*\}", done.stdout, re.DOTALL | re.MULTILINE)
    answer = json.loads(found.group()) if found else {}
    if done.returncode or not answer.get("success"):
        said = str(answer.get("error-message") or done.stderr or done.stdout).splitlines()
        reason = " ".join(line.strip() for line in said if line.strip() and not line.startswith("Using SuperLink"))
        raise FlowerError(f"{called} failed: {reason or f'exit code {done.returncode}'}")
    return dict(answer)
