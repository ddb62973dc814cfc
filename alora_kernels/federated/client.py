"""The client's side of a round: put the pieces together, train, return the shared half, keep the private one.

In:   Flower messages; the client's `Participant`; its `PrivateStore`.
Out:  replies that hold shared arrays, metrics and an echo of the round's nonce, and nothing else.
Who:  every engine, in one process, in Flower's simulation or on a real machine: `client_app` is the ClientApp of all.

A round depends only on the message and on what is on disk: private values are read from the store before training and
committed last, after the reply is built. A client killed in between repeats the round from the same values, and a
server that asks for a round again gets the same answer. The seed of local training is (seed, client, round).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client.mod.utils import make_ffn
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from numpy.typing import NDArray
from torch import nn

from .. import files
from . import model as adapters
from . import wire
from .config import FedConfig
from .dp import client_mods
from .participant import Participant, seeded
from .seeds import seed_of
from .state import BehindError, PrivateStore

log = logging.getLogger("alora_kernels.federated")

METHOD, BASE, SCALING, LAST = "method", "base", "scaling", "last"  # in a message's `config`, beside wire's
FINAL = "final.safetensors"  # a client's finished adapter, private half included; on the server the shared half


class DriftError(ValueError):
    """Local training changed what its method trains nowhere; the message names it, and holds neither data nor path."""


def agreement(config: FedConfig, model: nn.Module, base: str) -> wire.WireSpec:
    """What both sides must agree on, of an adapted model and the fingerprint of its base."""
    return adapters.wire_spec(
        model, config.spec, base=base, scaling=config.scaling, seed=config.seed, metrics=config.metrics
    )


@dataclass(frozen=True)
class Client:
    """One client of a run.

    Attributes:
        config: the run.
        participant: model and data; for this run only, because what its head began with is taken from it.
        store: where private values are kept between rounds.
    """

    config: FedConfig
    participant: Participant
    store: PrivateStore
    spec: wire.WireSpec = field(init=False)
    _first: Mapping[str, NDArray] = field(init=False, repr=False)
    _trains: Mapping[str, bool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        model = self.participant.model
        object.__setattr__(self, "spec", agreement(self.config, model, self.participant.base))
        first = {
            **adapters.arrays_of(model, self.config.spec, "private"),
            **adapters.arrays_of(model, self.config.spec, "frozen"),
        }
        object.__setattr__(self, "_first", first)
        object.__setattr__(self, "_trains", {name: p.requires_grad for name, p in model.named_parameters()})

    @property
    def name(self) -> str:
        """The participant's."""
        return self.participant.name

    def train(self, message: Message) -> Message:
        """One round: judge, train, judge, reply; the private half is committed last."""
        started = time.perf_counter()
        asked, sent = self._open(message)
        round_, run = int(asked[wire.ROUND]), str(asked[wire.RUN])
        model, share = self.participant.model, self.config.spec
        self._assemble(run, round_, sent)
        before = self._judge(round_)
        self._freeze()
        untrained = adapters.untrained(model, share)
        with seeded(seed_of(self.config.seed, self.name, round_)):
            self.participant.train(model)
        self._check_untouched(untrained)
        after = self._judge(round_)
        arrays = adapters.to_share(model, share, factors=not client_mods(self.config.dp))
        metrics = {wire.BEFORE + name: value for name, value in before.items()}
        metrics |= {wire.AFTER + name: value for name, value in after.items()}
        content = self._reply(asked, metrics, time.perf_counter() - started)
        content[wire.ARRAYS] = wire.to_record(arrays)
        reply = Message(content, reply_to=message)
        self.store.commit(run, self.name, round_, adapters.arrays_of(model, share, "private"), self.spec.digest)
        return reply

    def evaluate(self, message: Message) -> Message:
        """Judge the shared arrays of a message with the private half of the last round; at the end, save both."""
        started = time.perf_counter()
        asked, sent = self._open(message)
        round_, run = int(asked[wire.ROUND]), str(asked[wire.RUN])
        self._assemble(run, round_ + 1, sent)
        if asked.get(LAST):
            self._finish(self.store.folder / run / self.name)
        return Message(self._reply(asked, self._judge(round_), time.perf_counter() - started), reply_to=message)

    def _open(self, message: Message) -> tuple[Mapping[str, Any], dict[str, NDArray]]:
        """The settings and arrays of a message, if both sides mean the same run.

        Raises:
            WireError: another method, base model, scaling, rank or seed than this client's.
        """
        asked = cast(Mapping[str, Any], message.content[wire.CONFIG])
        for key, mine, words in (
            (METHOD, self.config.method, "method"),
            (BASE, self.participant.base, f"frozen model (compared by {self.config.base_check})"),
            (SCALING, self.config.scaling, "scaling"),
        ):
            if asked.get(key) != mine:
                raise wire.WireError(f"the server's {words} is {asked.get(key)}, client {self.name} has {mine}")
        sent = wire.from_record(message.content[wire.ARRAYS], self.spec)  # type: ignore[arg-type]
        if asked[wire.SPEC] != self.spec.digest:
            raise wire.WireError(f"client {self.name} has another seed or other metrics than the server")
        return asked, sent

    def _assemble(self, run: str, before: int, sent: Mapping[str, NDArray]) -> None:
        """The model as it stands before a round: first values, the last private half, what the server sent."""
        model, share = self.participant.model, self.config.spec
        adapters.put(model, share, self._first)
        if not self.config.reset_private:
            kept = self.store.load(run, self.name, before, self.spec.digest)
            adapters.put(model, share, kept[1] if kept else {})
        adapters.restart(model, share)
        adapters.put(model, share, sent)

    def _freeze(self) -> None:
        """Every parameter trains, or does not, as the method built it: PEFT thaws adapters that it enables again."""
        for name, parameter in self.participant.model.named_parameters():
            parameter.requires_grad_(self._trains[name])

    def _check_untouched(self, before: Mapping[str, NDArray]) -> None:
        """Raise if local training changed what the method trains nowhere.

        Raises:
            DriftError: names the arrays; the others were trained beside wrong ones, so nothing is sent.
        """
        after = adapters.untrained(self.participant.model, self.config.spec)
        moved = [key for key, values in before.items() if not np.array_equal(after[key], values)]
        if moved:
            shown = ", ".join(moved[:3]) + ", ..." * (len(moved) > 3)
            raise DriftError(
                f"client {self.name}: local training changed {shown}, which {self.config.method} trains nowhere:"
                " give its optimiser only parameters that require a gradient when training begins"
                " (PEFT's disable_adapter() thaws what it enables again)"
            )

    def _finish(self, folder: Path) -> None:
        """Leave the client with what it trained for: every matrix by key, and the adapter as PEFT loads it."""
        model: Any = self.participant.model
        own = adapters.matrices(model, self.config.spec)
        said = {METHOD: self.config.method, SCALING: str(self.config.scaling)}
        files.write(folder / FINAL, {key: m.tensor for key, m in own.items()}, said)
        if hasattr(model, "save_pretrained") and hasattr(model, "peft_config"):
            model.save_pretrained(str(folder / "adapter"))

    def _judge(self, round_: int) -> dict[str, float]:
        self.participant.model.eval()
        with seeded(seed_of(self.config.seed, self.name, round_, "judge")):
            measured = self.participant.evaluate(self.participant.model)
        metrics = {name: float(value) for name, value in measured.items()}
        if set(metrics) != set(self.config.metrics):
            raise ValueError(f"evaluate gave {sorted(metrics)}, the configuration has {sorted(self.config.metrics)}")
        return metrics

    def _reply(self, asked: Mapping[str, Any], metrics: Mapping[str, float], seconds: float) -> RecordDict:
        examples = self.participant.num_examples if self.config.weights == "examples" else 1
        echo = {wire.NONCE: asked[wire.NONCE], wire.SPEC: self.spec.digest, wire.CLIENT: self.name}
        return RecordDict(
            {
                wire.METRICS: MetricRecord({wire.EXAMPLES: examples, **metrics}),
                wire.REPLY: ConfigRecord({**echo, wire.SECONDS: seconds}),
            }
        )


def client_name(config: FedConfig, context: Context) -> str:
    """Which client a node is: its own word (`client=...` in the node's configuration), else by its partition number.

    Raises:
        ConfigError: a name the configuration does not have.
        ValueError: neither a name nor a partition number that fits.
    """
    name = context.node_config.get("client")
    if name is not None:
        return config.client(str(name)).name
    number = context.node_config.get("partition-id")
    if not isinstance(number, int) or not 0 <= number < len(config.clients):
        raise ValueError(f'node configuration needs client="..." or partition-id below {len(config.clients)}')
    return config.clients[number].name


def client_app(client_of: Callable[[Context], Client]) -> ClientApp:
    """Flower's ClientApp for whatever client a node is.

    An exception stays on the client, in its log: its text may quote a row of data. What the server learns is `told`.

    Args:
        client_of: the client of a node; called for every message, so it should remember what it built.
    """
    app = ClientApp()

    def answer(message: Message, context: Context, reply: Callable[[Client, Message], Message]) -> Message:
        try:
            return reply(client_of(context), message)
        except Exception as error:
            log.exception("this client could not answer")
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told(error)), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def clipped(client: Client, message: Message) -> Message:
            mods = client_mods(client.config.dp)
            return make_ffn(lambda inner, _: client.train(inner), mods)(message, context)

        return answer(message, context, clipped)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return answer(message, context, Client.evaluate)

    return app


def told(error: Exception) -> str:
    """What the server may learn of a client's exception: its type, and texts that cannot hold data or paths."""
    if isinstance(error, wire.WireError | DriftError):
        return str(error)
    if isinstance(error, BehindError):
        return "the server's checkpoint is older than the private half this client keeps, see the client's log"
    kind, cause = type(error).__name__, error.__cause__ or error
    said = cause.strerror if isinstance(cause, OSError) else None
    return f"{kind}: {said}" if said else f"{kind}, see the client's log"
