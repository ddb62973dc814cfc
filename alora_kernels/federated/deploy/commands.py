"""The commands of Flower's daemons, and the environment they run in.

In:   a home folder for everything Flower writes, addresses, certificates and keys.
Out:  program and arguments of SuperLink and SuperNodes; `<home>/flwr/config.toml`, which `flwr` commands read.
Who:  `runs` starts them as children; `alora fed server` and `alora fed client` become them.

FLWR_HOME lies inside the run's folder: neither configuration nor state of the user is touched. A server without
certificates is a simulation and listens on this machine only; with them it takes only clients whose key is registered.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .keys import Certificates, check_name
from .processes import FlowerError, free_port

#: no telemetry, no look for updates, no `pip install` when a run starts
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)
CONNECTION = "server"  # name of the one connection in a home's config.toml
LOOPBACK = "127.0.0.1"


def environment(home: Path) -> dict[str, str]:
    """The environment of Flower's processes: this one's, `ENVIRONMENT`, FLWR_HOME, and Flower's programs on the PATH.

    Args:
        home: folder of the run; Flower's home becomes `<home>/flwr`.

    Returns:
        A whole environment for a subprocess.
    """
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(Path(home).resolve() / "flwr"), "PATH": programs}


def program(name: str) -> str:
    """Path of one of Flower's programs, of this Python first.

    Raises:
        FlowerError: Flower is not installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None or importlib.util.find_spec("flwr") is None:
        raise FlowerError(f"{name} is not installed: pip install 'alora-kernels[federated]'")
    return found


def connect(home: Path, address: str, ca: Path | None = None) -> None:
    """Write where `flwr` commands with this home find the SuperLink.

    Args:
        home: folder of the run.
        address: "host:port".
        ca: certificate that signed the server's; None means no TLS, which only a simulation may do.
    """
    trust = "insecure = true" if ca is None else f"root-certificates = {json.dumps(str(Path(ca).resolve()))}"
    file = Path(home) / "flwr" / "config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ["[superlink]", f'default = "{CONNECTION}"', "", f"[superlink.{CONNECTION}]"]
    file.write_text("\n".join([*lines, f"address = {json.dumps(address)}", trust, ""]))


def superlink_command(
    home: Path, *, host: str = LOOPBACK, port: int = 8000, certificates: Certificates | None = None
) -> list[str]:
    """The command of a server's SuperLink.

    With certificates: TLS, and only clients whose key was registered. Without: a simulation, on this machine only.
    Other machines reach nothing but the clients' interface, see `superlink`.

    Args:
        home: folder of the run; the database is `<home>/superlink.db`, so registered keys survive a restart.
        host: address to listen on; "0.0.0.0" for clients on other machines.
        port: TCP port.
        certificates: TLS files of the server.

    Returns:
        Program and arguments.

    Raises:
        ValueError: no certificates and a host that is not this machine.
        FlowerError: Flower is not installed, or a certificate file is missing.
    """
    program("flower-superlink")
    command = [sys.executable, "-m", "alora_kernels.federated.deploy.superlink", "--host", host, "--port", str(port)]
    command += ["--database", str(Path(home).resolve() / "superlink.db"), "--disable-runtime-dependency-installation"]
    if certificates is None:
        if host != LOOPBACK:
            raise ValueError(f"host {host!r} needs certificates: without TLS the server listens on {LOOPBACK} only")
        return [*command, "--insecure", "--simulation"]
    files = {"cert": certificates.certificate, "key": certificates.key, "ca-cert": certificates.ca}
    for kind, file in files.items():
        command += [f"--ssl-{kind}file", str(existing(file, "make_certificates"))]
    return [*command, "--enable-supernode-auth"]


def supernode_command(
    client: str,
    server: str,
    *,
    ca: Path,
    key: Path,
    state_dir: Path,
    config: Path | None = None,
    data: Path | None = None,
    port: int | None = None,
    max_wait: float | None = None,
) -> list[str]:
    """The command of a client's SuperNode.

    Args:
        client: its name, the same after every restart.
        server: "host:port" of the SuperLink, a name or address in its certificate.
        ca: the `ca.pem` it got from the server; nobody else is trusted.
        key: its private key.
        state_dir: folder that keeps its private parts.
        config: its own copy of the configuration; without it the server's counts, and with it what is shared.
        data: its own data file.
        port: local port for its own processes; a free one by default.
        max_wait: seconds after which it gives up to reach the server; None: never.

    Returns:
        Program and arguments.

    Raises:
        ValueError: a name or path that Flower's node configuration cannot hold.
        FlowerError: Flower is not installed, or a file is missing.
    """
    node = {"client": check_name(client), "state-dir": str(Path(state_dir).resolve())}
    for what, file in (("config", config), ("data", data)):
        if file is not None:
            node[what] = str(existing(file, "this client"))
    command = [program("flower-supernode"), "--superlink", server]
    command += ["--root-certificates", str(existing(ca, "a copy of the server's ca.pem"))]
    command += ["--auth-supernode-private-key", str(existing(key, "make_node_key"))]
    command += ["--host", LOOPBACK, "--port", str(port or free_port()), "--node-config", node_config(node)]
    return command if max_wait is None else [*command, "--max-wait-time", str(max_wait)]


def node_config(values: Mapping[str, str]) -> str:
    """Key-value pairs as Flower's `--node-config` wants them: `key='value'`, separated by spaces.

    Raises:
        ValueError: a value with a quote or a control character, for which that format has no escape.
    """
    for key, value in values.items():
        if "'" in value or not value.isprintable():
            raise ValueError(f"{key} must not hold quotes or control characters, got {value!r}")
    return " ".join(f"{key}='{value}'" for key, value in values.items())


def existing(file: Path, source: str) -> Path:
    """The file, with its whole path.

    Raises:
        FlowerError: no such file; says where it comes from.
    """
    if not Path(file).is_file():
        raise FlowerError(f"{file} is missing; it comes from {source}")
    return Path(file).resolve()
