"""The client's side of a round: put the pieces together, train, return the shared half, keep the private one.

From Flower messages, a `Participant` and its `PrivateStore` to replies that hold shared arrays, metrics and an echo of
the round's nonce, and nothing else. Every engine uses `client_app`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.supercore.differential_privacy import KEY_CLIPPING_NORM, compute_clip_model_update
from torch import Tensor, nn

from .. import files
from ..text import some
from . import model as adapters
from . import wire
from .config import FedConfig
from .state import FINAL, BehindError, PrivateStore

log = logging.getLogger("alora_kernels.federated")


class DriftError(ValueError):
    """Local training changed what its method trains nowhere; the message names it, and holds neither data nor path."""


@dataclass(frozen=True)
class Participant:
    """What one client brings. Data stays behind `train` and `evaluate`: the federated code never sees a row."""

    name: str  # the same in every round and after a restart
    model: nn.Module  # as `adapt` made it; its trained values are replaced before every use, so nobody shares it
    train: Callable[[nn.Module], Any]  # one round, fresh optimiser; torch's generator is seeded by (seed, name, round)
    evaluate: Callable[[nn.Module], Mapping[str, float]]  # on its own test data; the same names for every client
    num_examples: int  # rows it trains on, its weight in the mean
    base: str  # `fingerprint` of the base before it was adapted


class Client:
    """One client of a run; its participant is for this run only, because what its head began with is taken from it.

    A round depends only on the message and on what is on disk: private values are read before training and committed
    last, after the reply is built. A client killed in between repeats the round from the same values, and a server that
    asks for a round again gets the same answer. The seed of local training is (seed, client, round).
    """

    def __init__(self, config: FedConfig, participant: Participant, store: PrivateStore) -> None:
        self.config, self.participant, self.store = config, participant, store
        self.name, self._model, self._share = participant.name, participant.model, config.spec
        self.spec = adapters.agreement(participant.model, config, participant.base)
        self._first = adapters.values(self._model, self._share, "private", "frozen")
        self._trains = {name: p.requires_grad for name, p in self._model.named_parameters()}

    def train(self, message: Message) -> Message:
        """One round: judge, train, judge, reply."""
        started = time.perf_counter()
        asked, run, round_ = self._open(message)
        dp, sent = self.config.dp, asked.get(KEY_CLIPPING_NORM)
        norm = dp.clipping_norm if dp is not None and self.config.clients_clip else None
        if norm is not None and sent != norm:
            raise wire.WireError(f"client {self.name} clips its updates to a norm of {norm:g}, the server says {sent}")
        metrics = {wire.BEFORE + name: value for name, value in self._judge(round_).items()}
        self._train(round_)
        metrics |= {wire.AFTER + name: value for name, value in self._judge(round_).items()}
        shared = wire.to_record(adapters.to_share(self._model, self._share, factors=norm is None))
        content = self._reply(asked, metrics, started)
        if norm is not None:
            shared = clipped(shared, message.content.array_records[wire.ARRAYS], norm)
        content[wire.ARRAYS] = shared
        reply = Message(content, reply_to=message)
        private = adapters.values(self._model, self._share, "private")
        self.store.commit(run, self.name, round_, private, self.spec.digest)
        return reply

    def evaluate(self, message: Message) -> Message:
        """Judge the shared arrays of a message with the private half of its round; at the end, save both."""
        started = time.perf_counter()
        asked, run, round_ = self._open(message)
        if asked.get(wire.LAST):
            self._finish(self.store.folder / run / self.name)
        return Message(self._reply(asked, self._judge(round_), started), reply_to=message)

    def _open(self, message: Message) -> tuple[Mapping[str, Any], str, int]:
        """The settings of a message, its run and its round, in which an evaluation follows training.

        The model is assembled: first values, the last private half before, what the server sent. WireError for another
        method, base, scaling, rank or seed than ours.
        """
        asked = cast(Mapping[str, Any], message.content[wire.CONFIG])
        for key, mine, words in (
            (wire.METHOD, self.config.method, "method"),
            (wire.BASE, self.participant.base, f"frozen model (compared by {self.config.base_check})"),
            (wire.SCALING, self.config.scaling, "scaling"),
        ):
            if asked.get(key) != mine:
                raise wire.WireError(f"the server's {words} is {asked.get(key)}, client {self.name} has {mine}")
        sent = wire.from_record(message.content[wire.ARRAYS], self.spec)  # type: ignore[arg-type]
        if asked[wire.SPEC] != self.spec.digest:
            raise wire.WireError(f"client {self.name} has another seed or other metrics than the server")
        run, round_ = str(asked[wire.RUN]), int(asked[wire.ROUND])
        kept = None
        if not self.config.reset_private:
            before = round_ + (message.metadata.message_type == MessageType.EVALUATE)
            kept = self.store.load(run, self.name, before, self.spec.digest)
        adapters.put(self._model, self._share, {**self._first, **(kept[1] if kept else {}), **sent})
        return asked, run, round_

    def _train(self, round_: int) -> None:
        """Local training of exactly what the method trains; a DriftError if other arrays changed: nothing is sent."""
        for name, parameter in self._model.named_parameters():  # PEFT thaws adapters that it enables again
            parameter.requires_grad_(self._trains[name])
        own = adapters.matrices(self._model, self._share).items()
        before = {key: m.tensor.detach().clone() for key, m in own if not m.tensor.requires_grad}
        with adapters.seeded(adapters.seed_of(self.config.seed, self.name, round_)):
            self.participant.train(self._model)
        after = adapters.matrices(self._model, self._share)
        if moved := [key for key, values in before.items() if not torch.equal(after[key].tensor, values)]:
            raise DriftError(
                f"client {self.name}: local training changed {some(moved, 3)}, which {self.config.method} trains"
                " nowhere: give its optimiser only parameters that require a gradient when training begins"
                " (PEFT's disable_adapter() thaws what it enables again)"
            )

    def _finish(self, folder: Path) -> None:
        """Leave the client with what it trained for: every matrix by key, and the adapter as PEFT loads it."""
        model: Any = self._model
        own = adapters.matrices(model, self._share)
        said = {wire.METHOD: self.config.method, wire.SCALING: str(self.config.scaling)}
        files.write(folder / FINAL, {key: m.tensor for key, m in own.items()}, said)
        if hasattr(model, "save_pretrained") and hasattr(model, "peft_config"):
            model.save_pretrained(str(folder / "adapter"))

    def _judge(self, round_: int) -> dict[str, float]:
        self._model.eval()
        with adapters.seeded(adapters.seed_of(self.config.seed, self.name, round_, "judge")):
            measured = self.participant.evaluate(self._model)
        metrics = {name: float(value) for name, value in measured.items()}
        if set(metrics) != set(self.config.metrics):
            raise ValueError(f"evaluate gave {sorted(metrics)}, the configuration has {sorted(self.config.metrics)}")
        return metrics

    def _reply(self, asked: Mapping[str, Any], metrics: Mapping[str, float], started: float) -> RecordDict:
        examples = self.participant.num_examples if self.config.weights == "examples" else 1
        echo = {wire.NONCE: asked[wire.NONCE], wire.SPEC: self.spec.digest, wire.CLIENT: self.name}
        reply = ConfigRecord({**echo, wire.SECONDS: time.perf_counter() - started})
        return RecordDict({wire.METRICS: MetricRecord({wire.EXAMPLES: examples, **metrics}), wire.REPLY: reply})


def clipped(reply: ArrayRecord, sent: ArrayRecord, norm: float) -> ArrayRecord:
    """The arrays of a reply, their change clipped by Flower, which divides by its norm: no change stays none."""
    arrays = reply.to_numpy_ndarrays()
    with suppress(ZeroDivisionError):
        compute_clip_model_update(arrays, [sent[key].numpy() for key in reply], norm)  # it pairs them by position
    return wire.to_record(dict(zip(reply, arrays, strict=True)))


def client_name(config: FedConfig, context: Context) -> str:
    """Which client a node is: its own word (`client=...` in the node's configuration), else by its partition number."""
    name = context.node_config.get("client")
    if name is not None:
        return config.client(str(name)).name
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < len(config.clients):
        raise ValueError(f'node configuration needs client="..." or partition-id below {len(config.clients)}')
    return config.clients[number].name


def client_app(client_of: Callable[[Context], Client]) -> ClientApp:
    """Flower's ClientApp for whatever client a node is.

    `client_of` is called for every message, so it should remember what it built. An exception stays on the client, in
    its log: its text may quote a row of data. What the server learns is `_told`.
    """

    def answer(message: Message, context: Context) -> Message:
        try:
            client = client_of(context)
            if message.metadata.message_type == MessageType.EVALUATE:
                return client.evaluate(message)
            return client.train(message)
        except Exception as error:
            log.exception("this client could not answer")
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _told(error)), reply_to=message)

    app = ClientApp()
    app.train()(answer)
    app.evaluate()(answer)
    return app


def _told(error: Exception) -> str:
    """What the server may learn of a client's exception: its type, and texts that cannot hold data or paths."""
    if isinstance(error, wire.WireError | DriftError):
        return str(error)
    if isinstance(error, BehindError):
        return "the server's checkpoint is older than the private half this client keeps, see the client's log"
    kind, cause = type(error).__name__, error.__cause__ or error
    said = cause.strerror if isinstance(cause, OSError) else None
    return f"{kind}: {said}" if said else f"{kind}, see the client's log"


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
) -> float:
    """One round of local training with a fresh AdamW; gives the mean loss, a ValueError where there is no batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    losses = []
    model.train()
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(value.detach())
    model.eval()
    if not losses:
        raise ValueError("a round of local training needs at least one batch")
    return float(torch.stack(losses).mean())


def shuffled(rows: int, steps: int, batch_size: int) -> Iterator[Tensor]:
    """Row numbers of `steps` batches, without replacement within an epoch, from torch's generator; all at least 1."""
    if min(rows, steps, batch_size) < 1:
        raise ValueError(f"rows, steps and batch_size must be >= 1, got {rows}, {steps}, {batch_size}")
    left = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left) < batch_size:
            left = torch.cat([left, torch.randperm(rows)])
        batch, left = left[:batch_size], left[batch_size:]
        yield batch
