"""Flower's strategies by name, set up for rounds that need one message per client.

In:   a name, the strategy's own keyword arguments, the quorum, `DpSettings`.
Out:  a strategy; `FromRound` for a run that goes on.
Who:  the server builds its strategy here.

Metrics come inside the train reply, because on real machines every message costs a fresh process: no evaluate messages.
A robust strategy that could not do its work with the quorum is refused: Flower's trimmed mean of 4 replies trims nobody
at its default beta of 0.2, and its Bulyan skips every round it has too few replies for.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from types import MappingProxyType
from typing import Any, NoReturn, get_args, get_type_hints

import flwr.serverapp.strategy as flower
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from . import wire
from .dp import DpSettings, make_private, num_sampled


class _KeepsDtype(flower.FedAvg):
    """Gives arrays back in the dtype they were sent in: NumPy's float64 scalars turn some of Flower's to float64."""

    dtypes: Mapping[str, str] | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self.dtypes = {key: array.dtype for key, array in arrays.items()}
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None and self.dtypes is not None:
            arrays = ArrayRecord(
                {key: Array(array.numpy().astype(self.dtypes[key], copy=False)) for key, array in arrays.items()}
            )
        return arrays, metrics


class FedAdam(_KeepsDtype, flower.FedAdam):
    """Flower's FedAdam, in the dtype of the arrays."""


class QFedAvg(_KeepsDtype, flower.QFedAvg):
    """Flower's q-FedAvg, in the dtype of the arrays."""


#: name -> class; the others of Flower's need more than the shared arrays
STRATEGIES: Mapping[str, type[flower.FedAvg]] = MappingProxyType(
    {
        "fedavg": flower.FedAvg,
        "fedavgm": flower.FedAvgM,
        "fedadam": FedAdam,
        "fedadagrad": flower.FedAdagrad,
        "fedyogi": flower.FedYogi,
        "fedmedian": flower.FedMedian,
        "fedtrimmedavg": flower.FedTrimmedAvg,
        "krum": flower.Krum,
        "multikrum": flower.MultiKrum,
        "bulyan": flower.Bulyan,
        "qfedavg": QFedAvg,
    }
)

_OURS = MappingProxyType(
    {
        "fraction_evaluate": "metrics come inside the train replies, so there are no evaluate messages",
        "evaluate_metrics_aggr_fn": "metrics come inside the train replies, so there are no evaluate messages",
        "min_evaluate_nodes": "metrics come inside the train replies, so there are no evaluate messages",
        "min_train_nodes": "it follows from the quorum",
        "min_available_nodes": "it follows from the quorum",
        "weighted_by_key": "the name is part of the wire format",
        "arrayrecord_key": "the name is part of the wire format",
        "configrecord_key": "the name is part of the wire format",
    }
)


def build_strategy(
    name: str, options: Mapping[str, Any], *, quorum: int, dp: DpSettings | None, population: int
) -> Strategy:
    """A strategy of Flower's for the shared arrays.

    Args:
        name: a key of `STRATEGIES`.
        options: its own keyword arguments, `fraction_train` among them.
        quorum: replies a round needs; with `dp`, all sampled clients are needed, see `num_sampled`.
        dp: differential privacy, or None.
        population: clients that may take part.

    Raises:
        ValueError: an unknown name or option, an option that is ours to set, numbers that do not fit together.
        TypeError: an option of another type.
    """
    if not 1 <= quorum <= population:
        raise ValueError(f"quorum must be between 1 and population={population}, got {quorum}")
    cls = _lookup(name)
    _check_options(name, cls, options)
    _check_numbers(name, options, quorum)
    sampled = num_sampled(options.get("fraction_train", 1.0), quorum, population) if dp else quorum
    with _quiet():
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
    return make_private(made, dp, sampled, population) if dp else made


def _lookup(name: str) -> type[flower.FedAvg]:
    if name in STRATEGIES:
        return STRATEGIES[name]
    if name.startswith("secagg"):
        refuse_secagg()
    if name == "fedprox":
        raise ValueError(
            "fedprox is not offered: its proximal term belongs into the clients' loss, which is the participants' own; "
            "add it in Participant.train and use fedavg, which aggregates the same way"
        )
    raise ValueError(f"unknown strategy {name!r}; known are {', '.join(STRATEGIES)}")


def _check_options(name: str, cls: type[flower.FedAvg], options: Mapping[str, Any]) -> None:
    parameters = dict(inspect.signature(cls).parameters)
    hints = get_type_hints(inspect.unwrap(cls.__init__))
    ours = [key for key in options if key in _OURS]
    if ours:
        raise ValueError(f"option {ours[0]!r} of strategy {name} is not yours to set: {_OURS[ours[0]]}")
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        valid = ", ".join(key for key in parameters if key not in _OURS)
        raise ValueError(f"strategy {name} has no option {unknown[0]!r}; it has {valid}")
    for key, value in options.items():
        _check_type(name, key, value, hints[key])
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"strategy {name} needs the option {key!r}")


def _check_type(name: str, key: str, value: Any, hint: Any) -> None:
    allowed = {float: (int, float), int: (int,), str: (str,)}.get(hint)
    if allowed is None:  # what is left are functions, or None for Flower's own
        if not (callable(value) or (value is None and type(None) in get_args(hint))):
            raise TypeError(f"option {key!r} of strategy {name} must be a function, got {value!r}")
    elif not isinstance(value, allowed) or isinstance(value, bool):
        raise TypeError(f"option {key!r} of strategy {name} must be {hint.__name__}, got {value!r}")


def _check_numbers(name: str, options: Mapping[str, Any], quorum: int) -> None:
    """Refuse what Flower would accept and then not do."""
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
def _quiet() -> Iterator[None]:
    """Without Flower's warning that there is no evaluation: that is the point."""
    logger = logging.getLogger("flwr")

    def keep(record: logging.LogRecord) -> bool:
        return "fraction_evaluate" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def refuse_secagg() -> NoReturn:
    """Say why there is no secure aggregation.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "secure aggregation is not offered: Flower has SecAgg+ only in its legacy workflow, and a server that cannot "
        "see single updates cannot check them for bad values; dp protects what the server passes on, not from itself"
    )


class FromRound(Strategy):
    """A strategy that goes on after `done` rounds, so that FedAdam's bias correction and the clients see round done+1.

    Flower's `start` still counts from 1, in its log, its result and `evaluate_fn`: add `done` there.

    Raises:
        ValueError: a negative number of rounds.
    """

    def __init__(self, strategy: Strategy, done: int) -> None:
        if done < 0:
            raise ValueError(f"done must be >= 0, got {done}")
        self.strategy = strategy
        self.done = done

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Of the true round."""
        return self.strategy.configure_train(self.done + server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Of the true round."""
        return self.strategy.aggregate_train(self.done + server_round, replies)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Of the true round."""
        return self.strategy.configure_evaluate(self.done + server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Of the true round."""
        return self.strategy.aggregate_evaluate(self.done + server_round, replies)

    def summary(self) -> None:
        """The strategy's own."""
        self.strategy.summary()
