"""Bodies and replies that nobody would write: no body may end in a 5xx, no reply may pass the federated guard torn."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from alora_kernels.federated import wire
from alora_kernels.federated.config import Limits
from alora_kernels.federated.guard import GuardedGrid
from alora_kernels.federated.local import InProcessGrid

from .arena import Arena, Found
from .client import CHAT, COMPLETIONS, LOAD, UNLOAD, Load, Tally, ask

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**40, 0.0, -0.5, 1e308, float("nan"), float("inf"), "", "\0",
    "a" * 5000, "\ud800", "../../etc", "task-000", [], [[]], [None], [-1], [2**40], [0] * 300, ["a", 1], {}, {"a": {}},
)  # fmt: skip
SPEC = wire.WireSpec(
    "fed-alora", {"layer.B": ("float32", (8, 4)), "other.B": ("float32", (6, 2))}, "base", 2.0, 0, ("accuracy", "loss")
)
NUMBERS = {wire.EXAMPLES, *(when + name for when in (wire.BEFORE, wire.AFTER) for name in SPEC.metrics)}
NODES = 4


async def bodies(arena: Arena, acts: int) -> Found:
    """Requests mutated in their fields and in their bytes, to every route that takes a body."""

    async def act(load: Load) -> None:
        path, body = _body(arena, load.draw)
        try:
            heard = await ask(arena.server.port, path, body, events=20)
        except (OSError, ValueError) as error:  # an error in a stream is no 5xx, and has its reason
            kind = "refused" if str(error).startswith("an error in a stream") else "lost"
            return load.tally.add(kind, f"{path}: {error}" if kind == "lost" else "")
        if heard.status >= 500:
            return load.tally.add("wrong", f"{heard.status} for {body[:150]!r}")
        load.tally.add("right" if heard.status == 200 else "refused")

    return await arena.storm(acts, act, clients=1)


def _body(arena: Arena, draw: Random) -> tuple[str, bytes]:
    task = arena.versions.name(draw.randrange(arena.size.tasks))
    asked: dict[str, Any] = {"model": task, "max_tokens": 3, "temperature": 0.5, "seed": 1, "n": 1, "stop": ["x"]}
    asked |= {"stream": draw.random() < 0.3, "top_p": 0.9, "top_k": 3}
    path, body = draw.choice(
        [
            (COMPLETIONS, asked | {"prompt": "a b c", "logprobs": 1}),
            (CHAT, asked | {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 2}),
            (LOAD, {"lora_name": "fuzzed", "lora_path": "nowhere", "load_inplace": False, "task": "a"}),
            (UNLOAD, {"lora_name": "fuzzed", "lora_int_id": 1}),
        ]
    )
    for _ in range(draw.randrange(1, 4)):
        field, value = draw.choice([*body, "unknown"]), draw.choice(VALUES)
        body[field] = draw.choice((value, [value], {field: value}, [body.get(field), value]))
    content = bytearray(json.dumps(body).encode())
    for _ in range(draw.choice((0, 0, 1, 4))):
        content[draw.randrange(len(content))] = draw.randrange(256)
    if draw.random() < 0.1:
        content = content[: draw.randrange(len(content))] if draw.random() < 0.5 else bytearray(b"[" * 20000)
    return path, bytes(content)


def _silent(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


def replies(folder: Path, draw: Random, acts: int) -> Found:
    """Rounds of four clients, one of which mutates its reply; what passes must be whole, finite and near.

    The others' replies must pass every time, and what a strategy gets of the mutated one must be as agreed.
    """
    tally, refused = Tally(), 0
    quiet = logging.getLogger("alora_kernels.federated")
    quiet.addFilter(_silent)  # a warning for each that is refused
    for act in range(acts):
        node, mutate = draw.randrange(1, NODES + 1), draw.choice(MUTATIONS)
        grid = GuardedGrid(_Grid(node, mutate, draw), SPEC, Limits(quorum=1), run="r", on_event=lambda event: None)
        try:
            passed = grid.send_and_receive(_messages(act))
        except Exception as error:
            tally.add("lost", f"{mutate.__name__}: {type(error).__name__}: {error}")
            continue
        nodes = {reply.metadata.src_node_id for reply in passed}
        bad = next((fault for reply in passed if (fault := _fault(reply))), "")
        refused += node not in nodes
        if bad:
            tally.add("wrong", f"{mutate.__name__}: {bad}")
        elif not nodes >= set(range(1, NODES + 1)) - {node}:
            tally.add("lost", f"{mutate.__name__}: of others passed {sorted(nodes)}")
        else:
            tally.add("refused" if node not in nodes else "right")
    quiet.removeFilter(_silent)
    through = f"{acts - refused:,} mutations changed nothing that was agreed, such as a bit of a small number"
    return tally.ended | {"note": "; ".join([through, *tally.faults])}


def _messages(number: int) -> list[Message]:
    arrays = {key: np.ones(shape, dtype) for key, (dtype, shape) in SPEC.arrays.items()}
    content = RecordDict({wire.ARRAYS: wire.to_record(arrays), wire.CONFIG: ConfigRecord({wire.ROUND: number})})
    return [Message(content, node, "train", group_id=str(number)) for node in range(1, NODES + 1)]


def _fault(reply: Message) -> str:
    """What is wrong with a reply that was let through, looked at without the guard's own functions."""
    arrays, metrics = reply.content[wire.ARRAYS], cast(MetricRecord, reply.content[wire.METRICS])
    numbers = {key: array.numpy() for key, array in cast(ArrayRecord, arrays).items()}
    if {key: (str(value.dtype), value.shape) for key, value in numbers.items()} != SPEC.arrays:
        return "other arrays than agreed"
    far = sum(float(np.square(value.astype(np.float64) - 1).sum()) for value in numbers.values())
    if not far <= sum(value.size for value in numbers.values()) * (1 + 1e-6):
        return f"an update of squared norm {far:.3g}"
    good = all(isinstance(value, int | float) and np.isfinite(value) for value in metrics.values())
    right = set(metrics) == NUMBERS and good and 0 < cast(float, metrics[wire.EXAMPLES]) <= 1_000_000
    return "" if right else f"metrics {dict(metrics)}"


class _Grid(InProcessGrid):
    """Clients that add a little to what they got, one of which mutates its records."""

    def __init__(self, node: int, mutate: Mutation, draw: Random) -> None:
        super().__init__(ClientApp(), NODES)
        self._node, self._mutate, self._draw = node, mutate, draw

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        found = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{message.metadata.dst_node_id}"
            records = _honest(message)
            if message.metadata.dst_node_id == self._node:
                self._mutate(records, self._draw)
            found.append(Message(RecordDict(cast(Any, records)), reply_to=message))
        return found


def _honest(message: Message) -> dict[str, Any]:
    sent, told = message.content[wire.ARRAYS], cast(ConfigRecord, message.content[wire.CONFIG])
    arrays = {key: array.numpy() + np.float32(0.01) for key, array in cast(ArrayRecord, sent).items()}
    says = {wire.CLIENT: f"client-{message.metadata.dst_node_id}", wire.NONCE: told[wire.NONCE], wire.SECONDS: 1.0}
    return {
        wire.ARRAYS: ArrayRecord({key: Array(value) for key, value in arrays.items()}),
        wire.METRICS: MetricRecord({**dict.fromkeys(NUMBERS, 0.5), wire.EXAMPLES: 10}),
        wire.REPLY: ConfigRecord({**says, wire.SPEC: told[wire.SPEC]}),
    }


def _bits(records: dict[str, Any], draw: Random) -> None:
    """Bits of a serialised array, its header among them."""
    key, array = draw.choice(list(records[wire.ARRAYS].items()))
    data = bytearray(array.data)
    for _ in range(draw.randrange(1, 9)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    records[wire.ARRAYS][key] = Array(dtype=array.dtype, shape=array.shape, stype=array.stype, data=bytes(data))


def _numbers(records: dict[str, Any], draw: Random) -> None:
    """A number that is none, or far away."""
    key, array = draw.choice(list(records[wire.ARRAYS].items()))
    values = array.numpy().copy()
    values[tuple(draw.randrange(size) for size in values.shape)] = draw.choice((np.nan, np.inf, 1e30, 1e6, -50))
    records[wire.ARRAYS][key] = Array(values)


def _shapes(records: dict[str, Any], draw: Random) -> None:
    """Another shape or dtype, in truth or only declared."""
    key, array = draw.choice(list(records[wire.ARRAYS].items()))
    shape = tuple(draw.choice((0, 1, 2, size, -size, 10**12)) for size in array.shape[: draw.randrange(3)])
    dtype = draw.choice(("float32", "float64", "int32", ">f4", "object", "(2,"))
    records[wire.ARRAYS][key] = draw.choice(
        (
            Array(dtype=dtype, shape=shape, stype=array.stype, data=array.data[: draw.randrange(len(array.data))]),
            Array(array.numpy().astype(draw.choice(("float64", "int32", "float16", ">f4")))),
            Array(array.numpy()[: draw.randrange(1, 4)]),
        )
    )


def _keys(records: dict[str, Any], draw: Random) -> None:
    """Arrays and metrics under other names, more or fewer of them."""
    record = records[draw.choice((wire.ARRAYS, wire.METRICS))]
    key = draw.choice(list(record))
    value = record.pop(key)
    for name in draw.choice(((), (key + wire.LEFT,), (key, "more"), (key.upper(),), (key + "\0",))):
        record[name] = value


def _metrics(records: dict[str, Any], draw: Random) -> None:
    """Metrics that are none, and weights that nobody has."""
    values = (float("nan"), float("inf"), -1, 0, 10**12, 2**200, [1.0], -0.0)
    key = draw.choice(sorted(NUMBERS))
    records[wire.METRICS][key] = draw.choice(values if key == wire.EXAMPLES else (*values[:2], [0.5]))


def _words(records: dict[str, Any], draw: Random) -> None:
    """What a reply says of itself, and which records it has."""
    field = draw.choice((wire.CLIENT, wire.NONCE, wire.SPEC))
    said = records[wire.REPLY]
    change = draw.randrange(3)
    if change == 0:
        said[field] = draw.choice(("", "a\nb", "x" * 200, 7, b"\0", "0" * 32, "client-99\x1b[0m"))
    elif change == 1:
        del said[field]
    else:
        records.pop(draw.choice(list(records)))


Mutation = Callable[[dict[str, Any], Random], None]
MUTATIONS: tuple[Mutation, ...] = (_bits, _bits, _numbers, _shapes, _keys, _metrics, _words)
