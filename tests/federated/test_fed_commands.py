"""App folders, commands and their environment, certificates and keys, read back by Flower's own parsers.

And who may call a SuperLink, who is trusted, what nobody else may read.
"""

from __future__ import annotations

import asyncio
import io
import os
import ssl
import stat
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

pytest.importorskip("flwr", reason="needs the extra `federated`")

from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.cli.flower_config import read_superlink_connection
from flwr.common.config import parse_config_args
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve
from flwr.supercore.utils import get_flwr_home
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from alora_kernels.federated.config import FedConfig
from alora_kernels.federated.deploy import apps, commands, processes, runs, superlink
from alora_kernels.federated.deploy.processes import FlowerError

EXAMPLE = Path(__file__).parents[2] / "examples" / "federated_app"
ELSEWHERE = "203.0.113.7"
AWKWARD = 'method: fed-alora\nnote: "a \\"quoted\\" \\\\ path, \'single\' and ümlaut"\nclients:\n  - {name: a}\n'


def test_flower_accepts_the_folder_and_only_the_two_files_travel(tmp_path):
    folder = apps.write_app(tmp_path / "app", AWKWARD, resume=True)
    config, warnings = load_and_validate(folder / "pyproject.toml")
    assert warnings == []
    assert config["tool"]["flwr"]["app"]["config"] == {"config": AWKWARD, "resume": True}
    (folder / "secret.py").write_text("")
    (folder / "rows.jsonl").write_text("{}")
    names = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))).namelist())
    assert names - {".info/CONTENT"} == {"app.py", "pyproject.toml"}


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("a: '''", {}, "config must not hold"),
        ("a: \x07", {}, "config must not hold"),
        ("a: 1", {"server": "a b:c"}, "server and client must be"),
    ],
)
def test_what_toml_and_python_cannot_hold_is_refused(tmp_path, text, options, says):
    with pytest.raises(ValueError, match=says):
        apps.write_app(tmp_path, text, **options)


def test_the_example_is_the_folder_by_hand(tmp_path):
    text = load_and_validate(EXAMPLE / "pyproject.toml")[0]["tool"]["flwr"]["app"]["config"]["config"]
    assert FedConfig.from_yaml(text).output.is_absolute()
    made = apps.write_app(tmp_path, text)
    assert (EXAMPLE / "app.py").read_text() == (made / "app.py").read_text()


def test_flower_parses_the_commands(tmp_path):
    """Read by Flower's own parsers: what each argument becomes."""
    files = commands.make_certificates(tmp_path)
    key, _ = commands.make_node_key(tmp_path, "clinic")
    command = commands.superlink_command(tmp_path, host="0.0.0.0", port=8123, certificates=files)
    server = _parse_args_run_superlink().parse_args(command[3:])
    assert (server.host, server.port, server.insecure, server.simulation) == ("0.0.0.0", 8123, False, False)
    assert (server.ssl_certfile, server.ssl_keyfile) == (str(files.certificate), str(files.key))
    assert server.enable_supernode_auth
    assert server.database == str(tmp_path / "superlink.db")

    data, own = tmp_path / "with space" / "rows = 3.jsonl", tmp_path / "run.yaml"
    data.parent.mkdir()
    for file in (data, own):
        file.touch()
    command = commands.supernode_command(
        "clinic", "fed.example.org:8123", ca=files.ca, key=key, state_dir=tmp_path / "my state", config=own, data=data
    )
    node = _parse_args_run_supernode().parse_args(command[1:])
    assert (node.superlink, node.insecure, node.host) == ("fed.example.org:8123", False, "127.0.0.1")
    assert (node.root_certificates, node.auth_supernode_private_key) == (str(files.ca), str(key))
    expected = {"client": "clinic", "state-dir": str(tmp_path / "my state"), "config": str(own), "data": str(data)}
    assert parse_config_args([node.node_config]) == expected


def test_a_server_without_certificates_stays_on_this_machine(tmp_path):
    command = commands.superlink_command(tmp_path)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert {"--insecure", "--simulation"} <= set(command)
    with pytest.raises(ValueError, match="needs certificates"):
        commands.superlink_command(tmp_path, host="0.0.0.0")


def test_missing_files_and_values_without_escape_are_named(tmp_path):
    with pytest.raises(FlowerError, match=r"ca\.pem is missing"):
        commands.supernode_command("a", "h:1", ca=tmp_path / "ca.pem", key=tmp_path / "a", state_dir=tmp_path)
    with pytest.raises(FlowerError, match=r"server\.pem is missing; it comes from make_certificates"):
        commands.superlink_command(tmp_path, certificates=commands.Certificates(tmp_path))
    for value in ("it's", "a\nb"):
        with pytest.raises(ValueError, match="data must not hold quotes"):
            commands.node_config({"data": value})


def test_without_flower_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(FlowerError, match=r"pip install 'alora-kernels\[federated\]'"):
        commands.superlink_command(tmp_path)


def test_the_environment_is_quiet_and_its_home_is_the_runs(tmp_path):
    env = commands.environment(tmp_path)
    assert env["FLWR_TELEMETRY_ENABLED"] == env["RAY_USAGE_STATS_ENABLED"] == "0"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    code = "import flwr.supercore.utils as u; print(u.get_flwr_home())"
    home = subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip()
    assert home == str(tmp_path / "flwr") != str(get_flwr_home())


def test_the_connection_is_what_flower_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    commands.connect(tmp_path, "127.0.0.1:8123", tmp_path / "ca.pem")
    secure = read_superlink_connection(commands.CONNECTION)
    assert (secure.address, secure.root_certificates) == ("127.0.0.1:8123", str(tmp_path / "ca.pem"))
    assert not secure.insecure
    commands.connect(tmp_path, "127.0.0.1:1")
    assert read_superlink_connection(None).insecure


def test_wrong_arguments_of_a_simulation(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num_clients and cpus must be >= 1"):
        runs.run_ray(tmp_path, 0, tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FlowerError, match="ray is not installed"):
        runs.run_ray(tmp_path, 1, tmp_path)


def test_no_server_is_a_clear_line(tmp_path):
    commands.connect(tmp_path, f"127.0.0.1:{processes.free_port()}")
    with pytest.raises(FlowerError, match="flwr list server failed"):
        runs.run_status(tmp_path, 1)


@pytest.mark.parametrize(
    ("path", "peer", "answered"),
    [
        ("/v1/fleet/pull-messages", ELSEWHERE, True),
        ("/health", ELSEWHERE, True),
        ("/v1/control/start-run", ELSEWHERE, False),
        ("/v1/runtime/pull-task-input", ELSEWHERE, False),
        ("/v1/fleet/../control/start-run", ELSEWHERE, False),
        ("/docs", ELSEWHERE, False),
        ("/v1/control/start-run", "127.0.0.1", True),
        ("/v1/control/start-run", "::1", True),
        ("/v1/control/start-run", "::ffff:127.0.0.1", True),
        ("/v1/control/start-run", "192.0.2.1", True),  # the address the server listens on: its own processes
        ("/v1/control/start-run", None, False),
        ("/v1/control/start-run", "a name", False),
    ],
)
def test_only_clients_calls_are_answered_to_other_machines(path, peer, answered):
    reached, sent = [], []  # of a call and of a websocket

    async def inner(scope, receive, send):
        reached.append(scope["path"])

    async def send(message):
        sent.append(message)

    for kind in ("http", "websocket"):
        scope = {"type": kind, "path": path, "client": peer and (peer, 5), "server": ("192.0.2.1", 8000)}
        asyncio.run(superlink.guarded(inner)(scope, None, send))
    assert reached == ([path, path] if answered else [])
    assert [m["status"] for m in sent if "status" in m] == ([] if answered else [403, 403])


# ---- certificates and keys


def handshake(files: commands.Certificates, name: str, ca: Path) -> str:
    """The subject a client sees that calls `name` and trusts `ca`."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    context = ssl.create_default_context(cafile=str(ca))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python 3.13 does by default
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    caller = context.wrap_bio(back, there, server_hostname=name)
    for side in (caller, server.wrap_bio(there, back, server_side=True), caller):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    return str(caller.getpeercert()["subject"])  # type: ignore[index]


def test_the_certificate_holds_for_its_hosts_and_this_machine_and_for_nobody_else(tmp_path):
    files, other = (commands.make_certificates(tmp_path / name, ["fed.example.org"]) for name in ("one", "two"))
    for name in ("localhost", "127.0.0.1", "fed.example.org"):
        assert "federation server" in handshake(files, name, files.ca)
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        handshake(files, "other.example.org", files.ca)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "localhost", other.ca)


def test_only_the_owner_reads_private_files_and_nothing_is_overwritten(tmp_path):
    commands.make_certificates(tmp_path)
    commands.make_node_key(tmp_path, "clinic")
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    secret, open_ = dict.fromkeys(("server.key", "clinic"), 0o600), ("ca.pem", "server.pem", "clinic.pub")
    assert modes == secret | dict.fromkeys(open_, 0o644)  # the authority keeps no key
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"ca\.pem exists"):
        commands.make_certificates(tmp_path)
    with pytest.raises(FileExistsError, match="clinic exists"):
        commands.make_node_key(tmp_path, "clinic")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_node_keys_are_what_flower_reads(tmp_path):
    private, public = commands.make_node_key(tmp_path, "clinic")
    pair = serialization.load_ssh_private_key(private.read_bytes(), None).public_key()
    assert pair == serialization.load_ssh_public_key(public.read_bytes())
    assert uses_nist_ec_curve(pair)
    assert public.read_text().startswith("ecdsa-sha2-nistp384 ")
    assert public.read_text().endswith(" clinic\n")


def test_the_authority_signs_once(tmp_path):
    authority = x509.load_pem_x509_certificate(commands.make_certificates(tmp_path, days=30).ca.read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert (authority.not_valid_after_utc - authority.not_valid_before_utc).days == 30
    with pytest.raises(ValueError, match="days must be >= 1"):
        commands.make_certificates(tmp_path / "x", days=0)


@pytest.mark.parametrize("name", ["", "two words", "../up", "a'b", "-x", "a" * 65, "line\n"])
def test_names_that_are_no_file_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="client must be"):
        commands.make_node_key(tmp_path, name)
