"""A whole federated run in one process: the server, and every client in turn, in the order of their node ids.

The files in `config.output` are those of real machines, with the private halves under `clients/`. Messages become
Flower's protobuf bytes in both directions, so no client ever holds an array of the server's, and a tap sees exactly
what travels. A client that raises becomes an error reply, as in a deployment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from .client import Client, Participant, client_app, client_name
from .config import FedConfig
from .log import Outcome
from .model import seed_of, seeded
from .server import Template, serve
from .state import CLIENTS, PrivateStore

log = logging.getLogger("alora_kernels.federated")


class InProcessGrid(Grid):
    """All clients in this process, as nodes 1 to num_nodes; one `client_app` answers for all, told apart by contexts.

    Creating a grid makes this process Flower's server process: `Message(...)` takes its sender from there. `on_message`
    gets a copy of every message, to a client and back, as read from the bytes that travel. `contexts`, node id ->
    `Context`, stay between messages; deleting one takes the node away.
    """

    def __init__(
        self, client_app: ClientApp, num_nodes: int, *, on_message: Callable[[Message], None] | None = None
    ) -> None:
        if num_nodes < 1:
            raise ValueError(f"num_nodes must be >= 1, got {num_nodes}")
        self._app, self._on_message = client_app, on_message
        self._waiting: dict[str, bytes] = {}
        TaskIdentity.task_id, TaskIdentity.node_id = 1, SUPERLINK_NODE_ID
        self.set_run(Run.create_empty(run_id=1))
        self.contexts = {
            node: Context(
                run_id=self._run.run_id,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": num_nodes},
                state=RecordDict(),
                run_config={},
            )
            for node in range(1, num_nodes + 1)
        }

    def set_run(self, run: Run) -> None:
        """Set the run whose id new messages carry."""
        self._run = run
        TaskIdentity.run_id = run.run_id

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node; the same as `Message(...)`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Ids of the nodes that are there."""
        return sorted(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Give messages ids and keep their bytes until replies are pulled; ValueError if a node is not there."""
        messages = list(messages)
        for message in messages:
            if message.metadata.dst_node_id not in self.contexts:
                raise ValueError(
                    f"message to node {message.metadata.dst_node_id}, but the nodes are {self.get_node_ids()}"
                )
        for message in messages:
            self._tap(data := self._bytes(message))
            self._waiting[message.metadata.message_id] = data
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Run the clients of those messages, by node id, and return their replies; none for an id pulled before."""
        waiting = [self._read(self._waiting.pop(name)) for name in message_ids if name in self._waiting]
        return [self._answer(message) for message in sorted(waiting, key=lambda m: m.metadata.dst_node_id)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Run the clients of these messages to their end, whatever the timeout, and return their replies."""
        return self.pull_messages(self.push_messages(messages))

    @staticmethod
    def _bytes(message: Message) -> bytes:
        message.metadata.__dict__["_message_id"] = uuid4().hex  # Flower's own grids set it this way, too
        data: bytes = message_to_proto(message).SerializeToString()
        return data

    @staticmethod
    def _read(data: bytes) -> Message:
        return message_from_proto(ProtoMessage.FromString(data))

    def _tap(self, data: bytes) -> None:
        if self._on_message is not None:
            self._on_message(self._read(data))

    def _answer(self, message: Message) -> Message:
        try:
            reply = self._app(message, self.contexts[message.metadata.dst_node_id])
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned {type(reply).__name__}, not a Message")
            data = self._bytes(reply)
        except Exception as error:
            log.error("node %d raised", message.metadata.dst_node_id, exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            data = self._bytes(Message(Error(code=code, reason=reason), reply_to=message))
        self._tap(data)
        return self._read(data)


def clients_of(
    config: FedConfig, participant_of: Callable[[str], Participant], folder: Path | None = None
) -> Callable[[Context], Client]:
    """From a node to its client, built once; private halves lie in the node's own `state-dir`, or else in `folder`."""
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
        on_message: as for `InProcessGrid`.

    Returns:
        The outcome; `status` is "stopped" when too few clients answered, the privacy budget is spent or the disk is
        full. The checkpoint then holds the last completed round and `resume` goes on from it.

    Raises:
        FileExistsError, CheckpointError: a run is there and resume is False; nothing to resume, or another's.
        ValueError, TypeError: an option or a number that does not fit, as `build_strategy` says.

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
