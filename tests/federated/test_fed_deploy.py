"""Flower as processes, for real: a Ray simulation, and a server with clients behind TLS on loopback.

The federation is `deployfakes`, whose result is known to the last bit, so what is tested is the way there.
"""

from __future__ import annotations

import os
import ssl
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import deployfakes
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from alora_kernels import data
from alora_kernels.federated import FedConfig, run
from alora_kernels.federated.deploy import runs as flower
from alora_kernels.federated.deploy.apps import write_app
from alora_kernels.federated.deploy.commands import (
    Certificates,
    environment,
    make_certificates,
    make_node_key,
    supernode_command,
)
from alora_kernels.federated.deploy.processes import FlowerError, Process, Processes, free_port
from alora_kernels.recipes.federated import participant
from tests.support.processes import kill, until, wait, wait_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECONDS = 600  # for what takes seconds on an idle machine: only a hang comes so far
ONLINE = "SuperNode ID:"  # what a SuperNode logs once the server has taken it in
NAMES = ("client-0", "client-1", "client-2")


@pytest.fixture(autouse=True, scope="module")
def importable():
    """Server and clients import `deployfakes` and this checkout from wherever they run."""
    here = [str(Path(deployfakes.__file__).parent), str(Path(__file__).parents[2])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        yield


def app_folder(tmp_path: Path, **settings) -> Path:
    text = deployfakes.settings(tmp_path / "out", **settings)
    return write_app(tmp_path / "app", text, server="deployfakes:server", client="deployfakes:client")


def result(tmp_path: Path) -> np.ndarray:
    return np.load(tmp_path / "out" / "final.npy")


def assert_nothing_runs(home: Path) -> None:
    """No process of this FLWR_HOME is left; one that was told to stop may end a moment later."""
    until(lambda: not running_below(home), 60, f"processes below {home} end")


def running_below(home: Path) -> list[list[str]]:
    """Command lines of processes whose FLWR_HOME lies below `home`."""
    left = [p.info for p in psutil.process_iter(["cmdline", "environ", "status"]) if p.info["environ"]]
    return [
        info["cmdline"]
        for info in left
        if info["environ"].get("FLWR_HOME", "").startswith(f"{home}/") and info["status"] != psutil.STATUS_ZOMBIE
    ]


def test_ray_gives_the_same_arrays_and_leaves_nothing_behind(tmp_path):
    lines: list[str] = []
    log = flower.run_ray(app_folder(tmp_path), 3, tmp_path, echo=lines.append, seconds=SECONDS)
    np.testing.assert_array_equal(result(tmp_path), deployfakes.by_hand(2))
    assert any("[ROUND 2/2]" in line for line in lines)
    assert "[ROUND 2/2]" in log.read_text()
    assert_nothing_runs(tmp_path)


def test_a_run_that_crashes_is_an_error_that_quotes_the_log(tmp_path):
    with pytest.raises(FlowerError, match=r"(?s)finished:failed.*crashes as it was told"):
        flower.run_ray(app_folder(tmp_path, crash=True), 2, tmp_path, seconds=SECONDS)
    assert_nothing_runs(tmp_path)


def test_a_superlink_that_dies_is_an_error(tmp_path):
    app, port = app_folder(tmp_path, least=99), free_port()
    with Processes(tmp_path / "logs") as processes:
        superlink = flower.start_superlink(processes, tmp_path, port=port)

        def die(line: str) -> None:
            if "Waiting for nodes" in line:
                kill(superlink)

        with pytest.raises(FlowerError, match="flwr list server failed"):
            flower.submit_and_wait(tmp_path, app, federation={"num-supernodes": 2}, echo=die, seconds=SECONDS)
    assert_nothing_runs(tmp_path)


@dataclass
class Federation:
    """A server with TLS and registered keys."""

    home: Path
    processes: Processes
    certificates: Certificates
    port: int
    keys: dict[str, tuple[Path, Path]]
    members: dict[str, Process] = field(default_factory=dict)

    def client(self, name: str, *, process: str = "", ca: Path | None = None, key: str = "") -> Process:
        home = self.home / "machines" / (process or name)
        command = supernode_command(
            name,
            f"127.0.0.1:{self.port}",
            ca=ca or self.certificates.ca,
            key=self.keys[key or name][0],
            state_dir=home / "state",
        )
        return self.processes.start(process or name, command, environment(home))

    def online(self) -> dict[str, Process]:
        """Its members, all taken in."""
        self.members = self.members or {name: self.client(name) for name in NAMES}
        for member in self.members.values():
            wait_line(member, ONLINE, SECONDS)
        return self.members


@pytest.fixture(scope="module")
def federation(importable, tmp_path_factory):
    """One for all tests: a server and its clients take half a minute to start. Who kills one of them comes last."""
    home, port = tmp_path_factory.mktemp("federation"), free_port()
    certificates = make_certificates(home / "tls")
    keys = {name: make_node_key(home / "keys", name) for name in (*NAMES, "stranger")}
    with Processes(home / "logs") as processes:
        flower.start_superlink(processes, home, port=port, certificates=certificates)
        for name in NAMES:
            flower.register(home, keys[name][1], name)
        yield Federation(home, processes, certificates, port, keys)
    assert_nothing_runs(home)


def test_a_deadline_stops_the_run(tmp_path, federation):
    with pytest.raises(FlowerError, match=r"run (\d+) still runs after 8 s") as raised:
        app = app_folder(tmp_path, least=99)  # waits for 99 nodes for ever
        flower.submit_and_wait(federation.home, app, seconds=8)
    number = int(str(raised.value).split()[1])
    until(lambda: flower.run_status(federation.home, number)[0] == "finished:stopped", SECONDS, "the run has stopped")


def test_tls_federation_turns_strangers_away_and_goes_on(tmp_path, federation):
    with pytest.raises(flower.AlreadyRegisteredError):
        flower.register(federation.home, federation.keys["client-0"][1], "client-0")
    stranger = federation.client("client-9", key="stranger")
    misled = federation.client("client-0", process="misled", ca=make_certificates(tmp_path / "other").ca)
    for process, remedy in ((stranger, "register its .pub file"), (misled, "not signed by the ca.pem")):
        assert wait(process, SECONDS) != 0
        assert remedy in flower.explain(process.log)
    federation.online()
    log = flower.submit_and_wait(federation.home, app_folder(tmp_path), seconds=SECONDS)
    np.testing.assert_array_equal(result(tmp_path), deployfakes.by_hand(2))
    assert "Sampled 3 nodes (out of 3)" in log.read_text()
    for number in range(3):
        seen = (tmp_path / "out" / f"took-part-{number}").read_text().splitlines()
        assert seen == ["['client', 'state-dir']"] * 2  # the node's own configuration, once a round


def test_operators_calls_from_another_machine_are_refused(federation):
    trust = ssl.create_default_context(cafile=str(federation.certificates.ca))

    def status(path: str, **headers: str) -> int:
        call = urllib.request.Request(f"https://127.0.0.1:{federation.port}{path}", method="POST", headers=headers)
        try:
            return urllib.request.urlopen(call, timeout=SECONDS, context=trust).status
        except urllib.error.HTTPError as error:
            return error.code

    elsewhere = {"X-Forwarded-For": "203.0.113.7"}  # uvicorn takes a proxy on this machine at its word
    assert status("/v1/control/list-runs", **elsewhere) == 403
    assert status("/v1/runtime/pull-task-input", **elsewhere) == 403
    assert status("/v1/control/list-runs") != 403
    assert status("/v1/fleet/pull-messages", **elsewhere) not in (403, 404)  # Flower answers: not its kind of message


def test_a_client_killed_in_mid_round_does_not_stop_the_others(tmp_path, federation):
    members = federation.online()

    def kill_when_it_stalls(line: str) -> None:
        victim = members["client-2"]
        if "Sampled 3 nodes" in line and victim.exit_code is None:
            until((tmp_path / "out" / "stalled").exists, SECONDS, "the client stalls")
            kill(victim)

    app = app_folder(tmp_path, least=2, stalls=2)
    log = flower.submit_and_wait(federation.home, app, echo=kill_when_it_stalls, seconds=SECONDS)
    assert members["client-2"].exit_code == -9
    assert "Received 2 results and 1 failures" in log.read_text()
    np.testing.assert_array_equal(result(tmp_path), deployfakes.by_hand(2, (0, 1)))


def test_one_configuration_gives_the_same_arrays_under_all_three_engines(tmp_path, monkeypatch):
    """The recipe for several machines on real tasks, the same in a simulation, the same in one process: to the bit.

    One thread each (OMP_NUM_THREADS): products summed in another order would differ in the last place. Two clients,
    and in the simulation one after the other: each starts a process that imports torch for every message.
    """
    tasks = ("movie", "nyt")
    try:
        for task in tasks:
            data.load_task(task, test_size=2)
    except data.MissingPackageError as error:
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import federated_loopback

    monkeypatch.setattr(federated_loopback, "TASKS", tasks)
    small = {"rounds": 1, "local_steps": 1, "batch_size": 4, "train_size": 20, "test_size": 8}
    events = federated_loopback.main(str(tmp_path / "apart"), "tiny-random-encoder", guard={"quorum": 2}, **small)
    answers = [e for e in events if e["event"] == "client" and e["kind"] == "train"]
    assert sorted(e["client"] for e in answers if e["accepted"]) == list(tasks)

    app = tomllib.loads((tmp_path / "apart" / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    config = FedConfig.from_yaml(app["config"]["config"]).model_copy(update={"output": tmp_path / "one"})
    run(config, lambda name: participant(config, name))
    simulated = config.model_copy(update={"output": tmp_path / "ray"})
    alone = {"cpus": os.cpu_count() or 1, "seconds": SECONDS}
    flower.run_ray(write_app(tmp_path / "app", simulated.to_yaml()), 2, tmp_path / "home", **alone)
    here = load_file(tmp_path / "one" / "final.safetensors")
    for engine in ("apart/run", "ray"):
        there = load_file(tmp_path / engine / "final.safetensors")
        assert set(there) == set(here)
        for key, array in here.items():
            np.testing.assert_array_equal(there[key], array, err_msg=f"{engine}: {key}")
    assert any(np.abs(array).max() > 0 for array in here.values())
    assert_nothing_runs(tmp_path)
