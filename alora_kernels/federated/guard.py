"""A grid that lets in only what was agreed: between any Flower strategy and any Flower grid.

In:   the messages of a strategy; a `WireSpec`; `Limits`.
Out:  the accepted replies with dense arrays, sorted by client name; one event per message and one per round.
Who:  `server` wraps its grid; strategies and Flower's privacy wrappers stay as they are.

Refused replies are dropped, not passed on as errors: Flower's privacy wrappers throw a whole round away for one error,
so a single bad client could stop everybody. Nothing a client sends can raise out of here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from . import wire
from .checks import Checks, finite
from .rounds import Round, stamp

log = logging.getLogger("alora_kernels.federated")


@dataclass(frozen=True)
class Limits:
    """When a round counts, and when to give up.

    Attributes:
        quorum: accepted replies a round needs, and nodes it waits for.
        deadline: seconds a round, and the wait for nodes, may take.
        norm_cap: largest L2 norm of reply - sent over all arrays; None for sqrt(number of values), which is a root
            mean square change of 1 per value.
        max_examples: largest weight a client may claim.
        patience: rounds in a row without a quorum before the run stops.

    Raises:
        ValueError: a limit that nothing could pass.
    """

    quorum: int = 2
    deadline: float = 600.0
    norm_cap: float | None = None
    max_examples: int = 1_000_000
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("quorum", "max_examples", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if not (finite(self.deadline) and self.deadline > 0):
            raise ValueError(f"deadline must be a number of seconds > 0, got {self.deadline!r}")
        if self.norm_cap is not None and not (finite(self.norm_cap) and self.norm_cap > 0):
            raise ValueError(f"norm_cap must be a number > 0, or None for its default, got {self.norm_cap!r}")


class QuorumError(RuntimeError):
    """Too few clients for too long; the message says how many, how long, and what to change."""


class GuardedGrid(Grid):
    """A grid whose replies are checked; everything else goes to the inner grid.

    Args:
        grid: the grid that transports.
        spec: what client and server agreed on.
        limits: quorum, deadline and caps.
        run: name of the run, told to the clients.
        on_event: called with each event, a flat dictionary ready for JSON.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        grid: Grid,
        spec: wire.WireSpec,
        limits: Limits,
        *,
        run: str,
        on_event: Callable[[dict[str, Any]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._spec, self._limits, self._name = grid, spec, limits, run
        self._on_event, self._clock = on_event, clock
        self._checks = Checks(spec, limits.norm_cap, limits.max_examples)
        self._clients: dict[int, str] = {}
        self._void_rounds = 0
        self._last_void = ""
        self.effective = 0  # training rounds that had a quorum
        self._most_nodes, self._waiting_since = -1, 0.0

    def set_run(self, run: Run) -> None:
        """Forwarded."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The inner grid's."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Forwarded."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Forwarded."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Forwarded, and not guarded."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Forwarded, and not guarded."""
        return self._grid.pull_messages(message_ids)

    def get_node_ids(self) -> list[int]:
        """Ids of the connected nodes, sorted.

        Flower's strategies ask once per second, for ever, while there are too few. Between two rounds more calls than
        a few mean just that, so the wait ends here.

        Raises:
            QuorumError: asked for longer than the deadline since the last round, or since the last node came.
        """
        ids, now = sorted(self._grid.get_node_ids()), self._clock()
        if len(ids) > self._most_nodes:
            self._most_nodes, self._waiting_since = len(ids), now
        elif now - self._waiting_since > self._limits.deadline:
            raise QuorumError(
                f"{len(ids)} nodes are connected and no further one came in {now - self._waiting_since:.0f} s (a round "
                f"needs {self._limits.quorum} replies): start more clients, ask for fewer nodes or raise the deadline"
            )
        return ids

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send one round's messages and return the replies that pass.

        Args:
            messages: of one round, at most one to a node, "train" or "evaluate"; records `arrays` and `config`.
            timeout: seconds; the limits' deadline holds when it is shorter.

        Returns:
            Accepted replies sorted by client name, so sums do not depend on who was first. Each holds the dense arrays
            (train) and the metrics. Nothing when a training round has fewer than the quorum: the round is void.

        Raises:
            QuorumError: this was one void round too many.
            ValueError: messages that are not a round's.
        """
        begin = self._clock()
        current = stamp(messages, self._spec, self._name)
        if current is None:
            return []
        limit = self._limits.deadline if timeout is None else min(timeout, self._limits.deadline)
        replies = self._grid.send_and_receive(current.outgoing, timeout=limit)
        current.receive(replies, self._checks, self._clients, limit)
        void = current.kind == "train" and len(current.accepted) < self._limits.quorum
        for event in current.events(void=void, seconds=self._clock() - begin):
            self._on_event(event)
        self._most_nodes = -1
        if current.kind == "train":
            self._void_rounds = self._void_rounds + 1 if void else 0
            self.effective += not void
        if void:
            self._void(current)
            return []
        return current.replies()

    def _void(self, current: Round) -> None:
        counts = f"{len(current.accepted)} of {len(current.sent)} replies accepted, {self._limits.quorum} needed"
        log.warning("round %d is void: %s", current.number, counts)
        entries = [*current.sent.values(), *current.extra]
        refused = [f"{entry.client or f'node {entry.node}'}: {entry.reason}" for entry in entries if entry.reason]
        shown = "; ".join(refused[:5]) + (f"; and {len(refused) - 5} more" if len(refused) > 5 else "")
        self._last_void = (
            f"{self._void_rounds} rounds in a row without a quorum, the last one (round {current.number}) with "
            f"{counts} within {self._limits.deadline:g} s: mend the clients named here, or lower the quorum. "
            f"{shown or 'Every reply was accepted: sample more nodes'}"
        )
        if self._void_rounds >= self._limits.patience:
            raise QuorumError(self._last_void)

    @property
    def nothing_done(self) -> QuorumError | None:
        """Why a run is not finished after its last round, if all its rounds were void."""
        return QuorumError(self._last_void) if self._last_void and not self.effective else None
