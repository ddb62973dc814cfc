"""The two apps that Flower starts: a server and a client that read the run from the app's configuration.

In:   `context.run_config["config"]`, the YAML text; on a client `context.node_config`: `client`, its name (in a
      simulation `partition-id` instead), `state-dir`, and perhaps `config` and `data`, its own files.
Out:  `server`, a ServerApp, and `client`, a ClientApp.
Who:  app folders (`federated.deploy.apps.write_app`, `examples/federated_app`) import these two names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from ..federated.client import Client, client_app
from ..federated.config import FedConfig
from ..federated.engine import clients_of
from ..federated.server import Template, serve
from .federated import base_fingerprint, participant, template

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Serve the run; a run that stops early ends as failed, so that `flwr list` says so."""
    config = FedConfig.from_yaml(str(context.run_config["config"]))
    known = Template(template(config), base_fingerprint(config))
    outcome = serve(grid, config, known, resume=bool(context.run_config.get("resume", False)), engine="flower")
    if outcome.status != "finished":
        raise RuntimeError(f"stopped after round {outcome.rounds}: {outcome.reason}")


@lru_cache(maxsize=4)
def _clients(text: str, data: str | None) -> Callable[[Context], Client]:
    config = FedConfig.from_yaml(text)
    return clients_of(config, lambda name: participant(config, name, data_file=data))


def _client_of(context: Context) -> Client:
    """A client with its own copy of the configuration shares what that says, whatever the server's says."""
    own, data = context.node_config.get("config"), context.node_config.get("data")
    text = str(context.run_config["config"]) if own is None else Path(str(own)).read_text()
    return _clients(text, None if data is None else str(data))(context)


client = client_app(_client_of)
