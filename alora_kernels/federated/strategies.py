"""Flower's strategies by name, set up for one message per client and round, and differential privacy around them.

From a name, the strategy's own keyword arguments, the quorum and `DpSettings` to the server's strategy. Also here: the
epsilon spent so far, for the ledger.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any, get_args, get_type_hints

import flwr.serverapp.strategy as flower
import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, SamplingMethod
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant

from . import wire
from .config import NO_SECAGG, DpSettings
from .state import layers

Aggregated = tuple[ArrayRecord | None, MetricRecord | None]


class _KeepsDtype(flower.FedAvg):
    """Gives arrays back in the dtype they were sent in: NumPy's float64 scalars turn some of Flower's to float64."""

    dtypes: Mapping[str, str] | None = None

    def configure_train(self, server_round: int, arrays: ArrayRecord, *rest: Any) -> Iterable[Message]:
        self.dtypes = {key: array.dtype for key, array in arrays.items()}
        return super().configure_train(server_round, arrays, *rest)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and self.dtypes is not None:
            arrays = wire.to_record({k: a.numpy().astype(self.dtypes[k], copy=False) for k, a in arrays.items()})
        return arrays, metrics


class FedAdam(_KeepsDtype, flower.FedAdam):
    """Flower's FedAdam, in the dtype of the arrays."""


class QFedAvg(_KeepsDtype, flower.QFedAvg):
    """Flower's q-FedAvg, in the dtype of the arrays."""


_ROBUST = (flower.FedMedian, flower.FedTrimmedAvg, flower.Krum, flower.MultiKrum, flower.Bulyan)
#: name -> class; the others of Flower's need more than the shared arrays
STRATEGIES: Mapping[str, type[flower.FedAvg]] = {
    cls.__name__.lower(): cls
    for cls in (flower.FedAvg, flower.FedAvgM, FedAdam, flower.FedAdagrad, flower.FedYogi, *_ROBUST, QFedAvg)
}

NO_FEDPROX = (
    "fedprox is not offered: its proximal term belongs into the clients' loss, which is the participants' own; "
    "add it in Participant.train and use fedavg, which aggregates the same way"
)
_OURS = {
    **dict.fromkeys(
        ("fraction_evaluate", "evaluate_metrics_aggr_fn", "min_evaluate_nodes"),
        "metrics come inside the train replies, so there are no evaluate messages",
    ),
    **dict.fromkeys(("min_train_nodes", "min_available_nodes"), "it follows from the quorum"),
    **dict.fromkeys(("weighted_by_key", "arrayrecord_key", "configrecord_key"), "the name is part of the wire format"),
}


def build_strategy(
    name: str, options: Mapping[str, Any], *, quorum: int, dp: DpSettings | None, population: int
) -> Strategy:
    """A strategy of `STRATEGIES` for the shared arrays; `options` are its own arguments, `population` all clients.

    With `dp` a round samples `max(int(population fraction_train), quorum)` clients, as Flower counts when everybody is
    connected, and all of them must reply. ValueError for an unknown name or option, one that is ours to set, or numbers
    that do not fit together; TypeError for an option of another type.
    """
    if name not in STRATEGIES:
        why = NO_SECAGG if name.startswith("secagg") else NO_FEDPROX if name == "fedprox" else None
        raise ValueError(why or f"unknown strategy {name!r}; known are {', '.join(STRATEGIES)}")
    cls = STRATEGIES[name]
    _check_options(name, cls, options)
    _check_numbers(name, options, quorum)
    sampled = max(int(population * options.get("fraction_train", 1.0)), quorum) if dp else quorum
    # metrics come inside the train reply: on real machines every message costs a fresh process; Flower would warn
    with quiet_flower(logging.ERROR):
        made = cls(
            **options,
            fraction_evaluate=0.0,
            min_train_nodes=sampled,
            min_evaluate_nodes=0,
            min_available_nodes=sampled,
            weighted_by_key=wire.EXAMPLES,
            arrayrecord_key=wire.ARRAYS,
            configrecord_key=wire.CONFIG,
        )
    return _private(made, dp, sampled, population) if dp else made


def _check_options(name: str, cls: type[flower.FedAvg], options: Mapping[str, Any]) -> None:
    parameters = dict(inspect.signature(cls).parameters)
    hints = get_type_hints(inspect.unwrap(cls.__init__))
    for key in options:
        if key in _OURS:
            raise ValueError(f"option {key!r} of strategy {name} is not yours to set: {_OURS[key]}")
    if unknown := sorted(set(options) - set(parameters)):
        valid = ", ".join(key for key in parameters if key not in _OURS)
        raise ValueError(f"strategy {name} has no option {unknown[0]!r}; it has {valid}")
    for key, value in options.items():
        kind = hints[key]
        if kind in (float, int, str):
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise TypeError(f"option {key!r} of strategy {name} must be {kind.__name__}, got {value!r}")
        elif not callable(value) and (value is not None or type(None) not in get_args(kind)):  # None: Flower's own
            raise TypeError(f"option {key!r} of strategy {name} must be a function, got {value!r}")
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"strategy {name} needs the option {key!r}")


def _check_numbers(name: str, options: Mapping[str, Any], quorum: int) -> None:
    """Refuse what Flower would accept and then not do: its trimmed mean of 4 replies trims nobody at a beta of 0.2."""
    fraction, bad = options.get("fraction_train", 1.0), options.get("num_malicious_nodes", 0)
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction_train must be in (0, 1], got {fraction}")
    if bad < 0:
        raise ValueError(f"num_malicious_nodes must be >= 0, got {bad}")
    need = {"krum": 2 * bad + 3, "multikrum": 2 * bad + 3, "bulyan": 4 * bad + 3}.get(name, 1)
    select = options.get("num_nodes_to_select", 1)
    if name == "multikrum" and not 1 <= select <= quorum:
        raise ValueError(f"num_nodes_to_select must be between 1 and quorum={quorum}, got {select}")
    if name == "fedtrimmedavg":
        beta = options.get("beta", 0.2)
        if not 0 < beta < 0.5:
            raise ValueError(f"beta must be in (0, 0.5), got {beta}; without trimming use fedavg")
        need = ceil(1 / beta)
        need += int(beta * need) < 1  # Flower rounds down: 1/49 of 49 is none
    if quorum < need:
        raise ValueError(f"{name} with these options needs quorum >= {need} to leave anybody out, got {quorum}")
    if name == "qfedavg" and not options.get("train_loss_key", "").startswith((wire.BEFORE, wire.AFTER)):
        raise ValueError(
            f"qfedavg needs train_loss_key, a metric all clients report, with its prefix: '{wire.BEFORE}loss' is the "
            "loss at the shared arrays, which the method asks for"
        )


@contextmanager
def quiet_flower(level: int) -> Iterator[None]:
    """Flower logs every step, which the ledger and the live table say as well: nothing below that level."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


class ServerSideClipping(flower.DifferentialPrivacyServerSideFixedClipping):
    """Flower's, for updates of norm zero too, which stay zero."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Aggregated:
        """Flower's, which divides by norms: a NumPy number over zero is infinity, and min(1, inf) clips nothing."""
        norm, self.clipping_norm = self.clipping_norm, np.float64(self.clipping_norm)
        try:
            with np.errstate(divide="ignore"):
                return super().aggregate_train(server_round, replies)
        finally:
            self.clipping_norm = norm  # a checkpoint holds plain numbers


class ClientSideClipping(flower.DifferentialPrivacyClientSideFixedClipping):
    """Flower's; a checkpoint knows it by this name."""


def _private(strategy: flower.FedAvg, dp: DpSettings, sampled: int, population: int) -> Strategy:
    """The strategy inside Flower's wrapper for fixed clipping.

    Noise is measured out for a mean of equally weighted replies and covers the arrays, not the metrics. NumPy's global
    generator draws it: who knows its seed, or its state in a checkpoint, can take the noise off again, so never seed it
    with anything a client knows.
    """
    if dp.accounting and type(strategy).aggregate_train is not flower.FedAvg.aggregate_train:
        raise ValueError(
            f"epsilon cannot be counted for {type(strategy).__name__}: the noise is measured out for a plain mean, in "
            "which one client moves the result by clipping_norm / clients at most; use fedavg, or accounting=False "
            "for noise without a statement about privacy"
        )
    config = PrivacyConfig(
        target_delta=dp.delta,
        population_size=population,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,  # Flower's fixed clipping takes none
        max_epsilon=dp.max_epsilon,
    )
    cls = ServerSideClipping if dp.side == "server" else ClientSideClipping
    accountant = RdpAccountant(config) if dp.accounting else None
    return cls(strategy, dp.noise_multiplier, dp.clipping_norm, sampled, accountant=accountant)


def privacy_spent(strategy: Strategy) -> dict[str, Any] | None:
    """Epsilon so far, with delta and the number of releases; None where nobody counts."""
    spent = (layer.privacy_spent() for layer in layers(strategy) if hasattr(layer, "privacy_spent"))
    return next((dataclasses.asdict(each) for each in spent if each is not None), None)
