"""A whole federated run in one process: the server, and every client in turn.

In:   a `FedConfig` and a function that makes a client's `Participant`.
Out:  the `Outcome`; the same files in `config.output` as on real machines, the private halves under `clients/`.
Who:  users and `alora fed run`; tests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message

from .client import Client, client_app, client_name
from .config import FedConfig
from .local import InProcessGrid
from .log import Outcome
from .participant import Participant, seeded
from .seeds import seed_of
from .server import CLIENTS, Template, serve
from .state import PrivateStore


def clients_of(
    config: FedConfig, participant_of: Callable[[str], Participant], folder: Path | None = None
) -> Callable[[Context], Client]:
    """A function from a node to its client, which builds each client once.

    Args:
        config: the run.
        participant_of: makes the participant of a name.
        folder: of the private halves; a node's own `state-dir` goes first.
    """
    built: dict[tuple[str, str], Client] = {}

    def client_of(context: Context) -> Client:
        name = client_name(config, context)
        place = str(context.node_config.get("state-dir") or folder or config.output / CLIENTS)
        if (name, place) not in built:
            with seeded(seed_of(config.seed, name, "build")):
                participant = participant_of(name)
            built[name, place] = Client(config, participant, PrivateStore(Path(place)))
        return built[name, place]

    return client_of


def run(
    config: FedConfig,
    participant_of: Callable[[str], Participant],
    *,
    template: Template | None = None,
    resume: bool = False,
    on_message: Callable[[Message], None] | None = None,
) -> Outcome:
    """Run server and clients in this process, one client after the other.

    Args:
        config: the run.
        participant_of: makes the participant of a name, fresh for this run.
        template: what the server knows of the model; the first client's by default.
        resume: go on from the checkpoint in `config.output`.
        on_message: sees every message as it crosses, in both directions.

    Returns:
        As `server.serve`.

    Raises:
        ValueError, FileExistsError, CheckpointError: as `server.serve`.

    Example:
        >>> config = FedConfig(method="fed-alora", clients=["clinic", "lab"], rounds=5)
        >>> run(config, make_participant).final
    """
    client_of = clients_of(config, participant_of)
    grid = InProcessGrid(client_app(client_of), len(config.clients), on_message=on_message)
    if template is None:
        first = client_of(next(iter(grid.contexts.values()))).participant
        template = Template(first.model, first.base)
    return serve(grid, config, template, resume=resume)
