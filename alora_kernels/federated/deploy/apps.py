"""The folder that `flwr run` submits for `alora fed`: a configuration and two imports, as in `examples/federated_app`.

Only these two files travel, and the imports find what is installed on each machine: a client runs no code from the
server but the names of two objects, and every machine needs the same version of this package.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

SERVER, CLIENT = "alora_kernels.recipes.federated:server", "alora_kernels.recipes.federated:client"
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

_PROJECT = """\
[project]
name = "alora-federated"
version = "1.0.0"
description = "One federated run of alora-kernels"
license = "Apache-2.0"
dependencies = []  # nothing is installed: every machine has alora-kernels[federated] already

[tool.flwr.app]
publisher = "local"
fab-include = ["app.py"]  # the logs and databases of a run may lie in the same folder

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
resume = {resume}
config = '''
{config}'''
"""

_APP = '''\
"""What Flower starts: the two apps, imported from what is installed on this machine."""

from {client[0]} import {client[1]} as client
from {server[0]} import {server[1]} as server

__all__ = ["client", "server"]  # Flower looks the names up here, without importing the file
'''


def write_app(folder: Path, config: str, *, resume: bool = False, server: str = SERVER, client: str = CLIENT) -> Path:
    """Write a folder that `flwr run` accepts, and return it; `pyproject.toml` and `app.py` in it are replaced.

    Both apps find the text of the configuration as `context.run_config["config"]`, and under "resume" whether the
    server goes on from its checkpoint. `server` and `client` are "module:name", importable on every machine. A
    ValueError for other references, or a configuration that TOML cannot hold as a literal.
    """
    if not (_REFERENCE.fullmatch(server) and _REFERENCE.fullmatch(client)):
        raise ValueError(f"server and client must be 'module:name', got {server!r} and {client!r}")
    project = _PROJECT.format(config=_literal(config), resume=str(resume).lower())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(project)
    (folder / "app.py").write_text(_APP.format(server=server.split(":"), client=client.split(":")))
    return folder


def _literal(config: str) -> str:
    """The text with a newline at its end, if a multi-line literal string gives it back unchanged."""
    text = "\n".join(config.splitlines()) + "\n"
    try:
        kept = tomllib.loads(f"config = '''\n{text}'''")["config"] == text
    except tomllib.TOMLDecodeError:
        kept = False
    if not kept:
        raise ValueError("config must not hold ''' or control characters: TOML could not carry it to the clients")
    return text
