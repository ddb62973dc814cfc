"""App folders, commands and their environment, read back by Flower's own parsers; who may call a SuperLink."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alora_kernels.federated.deploy import apps as flower_app
from alora_kernels.federated.deploy import commands as flower_commands
from alora_kernels.federated.deploy import processes as flower_processes
from alora_kernels.federated.deploy import runs as flower
from alora_kernels.federated.deploy import superlink as flower_superlink
from alora_kernels.federated.deploy.processes import FlowerError

EXAMPLE = Path(__file__).parents[2] / "examples" / "federated_app"
AWKWARD = 'method: fed-alora\nnote: "a \\"quoted\\" \\\\ path, \'single\' and ümlaut"\nclients:\n  - {name: a}\n'


def test_flower_accepts_the_folder_and_gives_the_text_back(tmp_path):
    from flwr.cli.config_utils import load_and_validate

    folder = flower_app.write_app(tmp_path / "app", AWKWARD, resume=True)
    config, warnings = load_and_validate(folder / "pyproject.toml")
    assert warnings == []
    assert config["tool"]["flwr"]["app"]["config"] == {"config": AWKWARD, "resume": True}


def test_only_the_two_files_travel(tmp_path):
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_disk

    folder = flower_app.write_app(tmp_path, AWKWARD)
    (folder / "secret.py").write_text("")
    (folder / "rows.jsonl").write_text("{}")
    names = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))).namelist())
    assert names - {".info/CONTENT"} == {"app.py", "pyproject.toml"}


def test_a_text_that_toml_cannot_hold_is_refused(tmp_path):
    for text in ("a: '''", "a: \x07"):
        with pytest.raises(ValueError, match="config must not hold"):
            flower_app.write_app(tmp_path, text)
    with pytest.raises(ValueError, match="server and client must be"):
        flower_app.write_app(tmp_path, "a: 1", server="a b:c")


def test_the_example_is_the_folder_by_hand(tmp_path):
    from flwr.cli.config_utils import load_and_validate

    from alora_kernels.federated.config import FedConfig

    text = load_and_validate(EXAMPLE / "pyproject.toml")[0]["tool"]["flwr"]["app"]["config"]["config"]
    assert FedConfig.from_yaml(text).output.is_absolute()
    made = flower_app.write_app(tmp_path, text)
    assert (EXAMPLE / "app.py").read_text() == (made / "app.py").read_text()


def test_flower_parses_the_commands(tmp_path):
    """Read by Flower's own parsers: what each argument becomes."""
    from flwr.common.config import parse_config_args
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    files = flower_commands.make_certificates(tmp_path)
    key, _ = flower_commands.make_node_key(tmp_path, "clinic")
    command = flower_commands.superlink_command(tmp_path, host="0.0.0.0", port=8123, certificates=files)
    server = _parse_args_run_superlink().parse_args(command[3:])
    assert (server.host, server.port, server.insecure, server.simulation) == ("0.0.0.0", 8123, False, False)
    assert (server.ssl_certfile, server.ssl_keyfile) == (str(files.certificate), str(files.key))
    assert server.enable_supernode_auth
    assert server.database == str(tmp_path / "superlink.db")

    data, own = tmp_path / "with space" / "rows = 3.jsonl", tmp_path / "run.yaml"
    data.parent.mkdir()
    for file in (data, own):
        file.touch()
    command = flower_commands.supernode_command(
        "clinic", "fed.example.org:8123", ca=files.ca, key=key, state_dir=tmp_path / "my state", config=own, data=data
    )
    node = _parse_args_run_supernode().parse_args(command[1:])
    assert (node.superlink, node.insecure, node.host) == ("fed.example.org:8123", False, "127.0.0.1")
    assert (node.root_certificates, node.auth_supernode_private_key) == (str(files.ca), str(key))
    expected = {"client": "clinic", "state-dir": str(tmp_path / "my state"), "config": str(own), "data": str(data)}
    assert parse_config_args([node.node_config]) == expected


def test_a_server_without_certificates_stays_on_this_machine(tmp_path):
    command = flower_commands.superlink_command(tmp_path)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert {"--insecure", "--simulation"} <= set(command)
    with pytest.raises(ValueError, match="needs certificates"):
        flower_commands.superlink_command(tmp_path, host="0.0.0.0")


def test_missing_files_and_values_without_escape_are_named(tmp_path):
    with pytest.raises(FlowerError, match=r"ca\.pem is missing"):
        flower_commands.supernode_command("a", "h:1", ca=tmp_path / "ca.pem", key=tmp_path / "a", state_dir=tmp_path)
    with pytest.raises(FlowerError, match=r"server\.pem is missing; it comes from make_certificates"):
        flower_commands.superlink_command(tmp_path, certificates=flower_commands.Certificates(tmp_path))
    for value in ("it's", "a\nb"):
        with pytest.raises(ValueError, match="data must not hold quotes"):
            flower_commands.node_config({"data": value})


def test_without_flower_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FlowerError, match=r"pip install 'alora-kernels\[federated\]'"):
        flower_commands.superlink_command(tmp_path)


def test_the_environment_is_quiet_and_its_home_is_the_runs(tmp_path):
    from flwr.supercore.utils import get_flwr_home

    env = flower_commands.environment(tmp_path)
    assert env["FLWR_TELEMETRY_ENABLED"] == env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    code = "import flwr.supercore.utils as u; print(u.get_flwr_home())"
    home = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert home == str(tmp_path / "flwr") != str(get_flwr_home())


def test_the_connection_is_what_flower_reads(tmp_path, monkeypatch):
    from flwr.cli.flower_config import read_superlink_connection

    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    flower_commands.connect(tmp_path, "127.0.0.1:8123", tmp_path / "ca.pem")
    secure = read_superlink_connection(flower_commands.CONNECTION)
    assert (secure.address, secure.root_certificates) == ("127.0.0.1:8123", str(tmp_path / "ca.pem"))
    assert not secure.insecure
    flower_commands.connect(tmp_path, "127.0.0.1:1")
    assert read_superlink_connection(None).insecure


def test_wrong_arguments_of_a_simulation(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_clients and cpus must be >= 1"):
        flower.run_ray(tmp_path, 0, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FlowerError, match="ray is not installed"):
        flower.run_ray(tmp_path, 1, tmp_path)


def test_no_server_is_a_clear_line(tmp_path):
    flower_commands.connect(tmp_path, f"127.0.0.1:{flower_processes.free_port()}")
    with pytest.raises(FlowerError, match="flwr list server failed"):
        flower.run_status(tmp_path, 1)


@pytest.mark.parametrize(
    ("path", "peer", "answered"),
    [
        ("/v1/fleet/pull-messages", "203.0.113.7", True),
        ("/health", "203.0.113.7", True),
        ("/v1/control/start-run", "203.0.113.7", False),
        ("/v1/runtime/pull-task-input", "203.0.113.7", False),
        ("/v1/fleet/../control/start-run", "203.0.113.7", False),
        ("/docs", "203.0.113.7", False),
        ("/v1/control/start-run", "127.0.0.1", True),
        ("/v1/control/start-run", "::1", True),
        ("/v1/control/start-run", "::ffff:127.0.0.1", True),
        ("/v1/control/start-run", "192.0.2.1", True),  # the address the server listens on: its own processes
        ("/v1/control/start-run", None, False),
        ("/v1/control/start-run", "a name", False),
    ],
)
def test_only_clients_calls_are_answered_to_other_machines(path, peer, answered):
    reached, sent = [], []

    async def inner(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    async def receive():
        return {}

    scope = {"type": "http", "path": path, "client": peer and (peer, 5), "server": ("192.0.2.1", 8000)}
    asyncio.run(flower_superlink.guarded(inner)(scope, receive, send))
    assert reached == ([path] if answered else [])
    assert [m["status"] for m in sent if "status" in m] == ([] if answered else [403])
