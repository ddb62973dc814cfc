"""Events as guard and server write them, with numbers a reader can add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from alora_kernels.federated.log import Event, Ledger, read

UP, DOWN = 100, 300
REASON = "layer.lora_B has 3 values that are not finite"
SILENT = "no reply within 600 s"


def run_event(clients: Sequence[str] = ("ann", "bob"), rounds: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "event": "run", "run": "r", "method": "fed-alora", "engine": "in-process", "spec": "0" * 64, "rounds": rounds,
        "clients": list(clients), "metric": "accuracy", "higher_is_better": True, "aggregation": "mean of B",
        "shared_keys": 2, "bytes_down": DOWN, "bytes_up": dict.fromkeys(clients, UP), "versions": {},
        "resumed_at": None,
    } | changes  # fmt: skip


def client_event(
    number: int, client: str, before: float = 0.5, after: float = 0.6, reason: str | None = None, **changes: Any
) -> dict[str, Any]:
    good = reason is None
    return {
        "event": "client", "kind": "train", "round": number, "node": crc32(client.encode(errors="replace")),
        "client": client, "accepted": good, "reason": reason, "bytes_down": DOWN, "bytes_up": UP, "examples": 50,
        "seconds": 1.5, "before": {"accuracy": before, "loss": 1.0} if good else {},
        "after": {"accuracy": after, "loss": 0.5} if good else {},
    } | changes  # fmt: skip


def judged_event(number: int, client: str, value: float) -> dict[str, Any]:
    event = client_event(number, client, kind="evaluate", bytes_up=0, metrics={"accuracy": value})
    return {name: event[name] for name in event if name not in ("before", "after")}


def round_event(number: int, accepted: int = 2, rejected: int = 0, **changes: Any) -> dict[str, Any]:
    sampled = accepted + rejected
    return {
        "event": "round", "kind": "train", "round": number, "sampled": sampled, "accepted": accepted,
        "rejected": rejected, "void": False, "bytes_down": DOWN * sampled, "bytes_up": UP * sampled, "seconds": 2.0,
    } | changes  # fmt: skip


def one_round(
    number: int, values: Mapping[str, tuple[float, float]], lost: Mapping[str, str] | None = None
) -> Iterator:
    """A training round of clients that are accepted with (before, after), and of others lost for a reason."""
    lost = lost or {}
    yield from (client_event(number, name, *pair) for name, pair in values.items())
    yield from (client_event(number, name, reason=reason) for name, reason in lost.items())
    yield round_event(number, len(values), len(lost))


def judgement(number: int, values: Mapping[str, float]) -> Iterator:
    """The evaluation at the end."""
    yield from (judged_event(number, name, value) for name, value in values.items())
    yield round_event(number, len(values), kind="evaluate", bytes_up=0)


def whole_run(rounds: int = 3, clients: Sequence[str] = ("ann", "bob")) -> list[dict[str, Any]]:
    """A run in which client i begins at 0.2 (i + 1) and gains 0.1 a round, and 0.05 more for itself."""
    events = [run_event(clients, rounds)]
    start = {name: 0.2 * (i + 1) for i, name in enumerate(clients)}
    for k in range(1, rounds + 1):
        events += one_round(k, {n: (v + 0.1 * (k - 1), v + 0.1 * k + 0.05) for n, v in start.items()})
    events += judgement(rounds, {n: v + 0.1 * rounds for n, v in start.items()})
    return [*events, {"event": "end", "round": rounds, "status": "finished", "reason": None}]


def written(path: Path, events: Iterable[Event], **options: Any) -> list[dict[str, Any]]:
    """The events after they were written to a ledger, or to what is left of one after `resume_from`."""
    with Ledger(path, **options) as ledger:
        for event in events:
            ledger.write(event)
    return read(path)
