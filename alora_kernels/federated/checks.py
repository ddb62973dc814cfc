"""One reply against what was agreed, before anybody averages it.

From a reply's content, the arrays that were sent and the nonce they were sent with to an `Answer`, or a `RefusedError`
with the reason. `guard` asks for every reply; nothing here knows about rounds, nodes or Flower's transport.

The first check that fails gives the reason, so what is cheap and names the cause comes first: an old client's reply is
refused for its spec hash, not because "keys differ". Plain averaging would take NaN, 1e30, negative weights and shapes
that merely broadcast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from . import wire

Kind = Literal["train", "evaluate"]
Number = int | float
REASON = 300  # characters of a reason: it may quote what a client sent
NAME = 100  # characters of a client's name


class RefusedError(ValueError):
    """A reply that is not let in; the message is the reason."""


@dataclass(frozen=True)
class Answer:
    """A reply that is what was agreed.

    Attributes:
        arrays: dense, of the agreed dtypes and shapes; None for an evaluation.
        metrics: name -> finite number, the number of examples among them.
    """

    arrays: ArrayRecord | None
    metrics: dict[str, Number]


@dataclass(frozen=True)
class Checks:
    """The bounds replies are held to.

    Attributes:
        spec: what was agreed.
        norm_cap: largest L2 norm of `reply - sent` over all arrays; None for sqrt(number of values).
        max_examples: largest weight a client may claim.
    """

    spec: wire.WireSpec
    norm_cap: float | None
    max_examples: int

    def answer(self, kind: Kind, content: RecordDict, nonce: str, sent: wire.NDArrays) -> Answer:
        """The checked arrays and metrics of a reply's records, or RefusedError or WireError with the reason.

        `nonce` and `sent` are what the message went out with.
        """
        expected: dict[str, type] = {wire.METRICS: MetricRecord, wire.REPLY: ConfigRecord}
        if kind == "train":
            expected[wire.ARRAYS] = ArrayRecord
        for name in sorted(set(content) | set(expected)):
            if name not in expected or not isinstance(content.get(name), expected[name]):
                state = "lacks" if name not in content else "has an unexpected"
                agreed = ", ".join(expected)
                raise RefusedError(
                    f"{state} record {short(name, 50)!r}; the reply of this {kind} round has exactly {agreed}"
                )
        self._origin(content.config_records[wire.REPLY], nonce)
        metrics = self._metrics(kind, content.metric_records[wire.METRICS])
        arrays = self._arrays(content.array_records[wire.ARRAYS], sent) if kind == "train" else None
        return Answer(arrays, metrics)

    def _origin(self, reply: ConfigRecord, nonce: str) -> None:
        if reply.get(wire.NONCE) != nonce:
            raise RefusedError("nonce is not the one this message was sent with: an old or a forged reply")
        if reply.get(wire.SPEC) != self.spec.digest:
            raise RefusedError(
                "spec hash differs: the client has another method, base model, scaling or seed, other arrays or metrics"
            )
        if client_name(reply) is None:
            raise RefusedError(f"{wire.CLIENT} must be a printable name of 1 to {NAME} characters")

    def _metrics(self, kind: Kind, record: MetricRecord) -> dict[str, Number]:
        agreed = self.spec.metric_keys if kind == "train" else {wire.EXAMPLES, *self.spec.metrics}
        wire.check_keys(set(record), agreed, "metrics")
        numbers: dict[str, Number] = {}
        for key in sorted(record):
            value = record[key]
            if not isinstance(value, int | float):
                raise RefusedError(f"{key} is a list, agreed is one number")
            if not wire.finite(value):
                raise RefusedError(f"{key} is {value}, not a finite number")
            numbers[key] = value
        if not 0 < numbers[wire.EXAMPLES] <= self.max_examples:
            raise RefusedError(f"{wire.EXAMPLES} is {numbers[wire.EXAMPLES]}, outside (0, {self.max_examples}]")
        return numbers

    def _arrays(self, record: ArrayRecord, sent: wire.NDArrays) -> ArrayRecord:
        dense, arrays = wire.expand(record, self.spec, sent)
        for key, value in arrays.items():
            if not np.isfinite(value).all():
                raise RefusedError(f"{key} has values that are not finite")
        norm, cap = _distance(arrays, sent), self.cap
        if not norm <= cap:
            raise RefusedError(f"L2 norm of the update is {norm:.3g}, the cap is {cap:.3g}")
        return dense

    @property
    def cap(self) -> float:
        """The norm cap in force."""
        if self.norm_cap is not None:
            return self.norm_cap
        return math.sqrt(sum(math.prod(shape) for _, shape in self.spec.arrays.values()))


def _distance(arrays: wire.NDArrays, sent: wire.NDArrays) -> float:
    """L2 norm over all arrays of the difference, in float64, where 1e30 squared is a number, or inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = (np.square(np.subtract(arrays[key], sent[key], dtype=np.float64)).sum() for key in sent)
        return math.sqrt(sum(map(float, squares)))


def client_name(reply: ConfigRecord) -> str | None:
    """The name a reply gives, or None if it gives none that can stand in a log."""
    name = reply.get(wire.CLIENT)
    return name if isinstance(name, str) and 0 < len(name) <= NAME and name.isprintable() else None


def short(text: str, length: int = REASON) -> str:
    """One printable line: a client's words must not write lines of their own into a log."""
    return "".join(c if c.isprintable() else " " for c in text[:length])


def bytes_that_came(content: RecordDict) -> int:
    """Bytes of the numbers in a reply; where declared shapes lie, the bytes there are."""
    data = sum(len(array.data) for record in content.array_records.values() for array in record.values())
    try:
        declared = wire.payload_bytes(content)
    except Exception:  # a dtype may be any text, a dimension any integer
        return data
    return declared if 0 <= declared <= data else data
