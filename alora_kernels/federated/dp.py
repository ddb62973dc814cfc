"""Differential privacy of the clients: settings, Flower's wrapper around a strategy, and what has been spent.

In:   `DpSettings` and a strategy.
Out:  the strategy that clips and adds noise; the client's mods; epsilon so far.
Who:  `strategies` wraps; the client takes `client_mods`; the server writes `privacy_spent` into its ledger.

The noise is measured out for a mean of equally weighted replies and covers the arrays, not the metrics that clients
report. It is drawn from NumPy's global generator: who knows its seed, or its state in a checkpoint, can take the noise
off again, so never seed it with anything a client knows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp.mod import fixedclipping_mod
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from flwr.supercore.privacy_accounting import NeighboringRelation, PrivacyConfig, SamplingMethod
from flwr.supercore.privacy_accounting.rdp_accountant import RdpAccountant


@dataclass(frozen=True)
class DpSettings:
    """Client-level differential privacy with fixed clipping.

    Formula: `noise std = noise_multiplier * clipping_norm / number of sampled clients`, on each value of the mean.

    Attributes:
        noise_multiplier: z of the Gaussian mechanism; 0 only without accounting.
        clipping_norm: cap on the L2 norm of one client's whole update.
        delta: of the (epsilon, delta) that is reported.
        max_epsilon: the run stops before this is exceeded; None only reports.
        side: who clips, "server" or "client" (which then must be trusted to).
        accounting: keep count of epsilon. It needs plain fedavg, equal weights, and every sampled client's reply: a
            round with one missing is void. Without it there is noise but no statement about privacy.

    Raises:
        ValueError: a value outside its range.
    """

    noise_multiplier: float
    clipping_norm: float
    delta: float = 1e-5
    max_epsilon: float | None = None
    side: Literal["server", "client"] = "server"
    accounting: bool = True

    def __post_init__(self) -> None:
        if not (isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier must be >= 0, got {self.noise_multiplier}")
        if self.accounting and self.noise_multiplier == 0:
            raise ValueError("noise_multiplier must be > 0 for accounting; pass accounting=False to clip only")
        if not (isfinite(self.clipping_norm) and self.clipping_norm > 0):
            raise ValueError(f"clipping_norm must be > 0, got {self.clipping_norm}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must be between 0 and 1, got {self.delta}")
        if self.max_epsilon is not None and not (isfinite(self.max_epsilon) and self.max_epsilon > 0):
            raise ValueError(f"max_epsilon must be > 0 or None, got {self.max_epsilon}")
        if self.max_epsilon is not None and not self.accounting:
            raise ValueError("max_epsilon needs accounting=True")
        if self.side not in ("server", "client"):
            raise ValueError(f"side must be 'server' or 'client', got {self.side!r}")


class ServerSideClipping(DifferentialPrivacyServerSideFixedClipping):
    """Flower's, for arrays that it does clip, and for updates of norm zero, which stay zero."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's, see `_refuse_scalars`."""
        _refuse_scalars(arrays)
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's, which divides by norms: a NumPy number over zero is infinity, and min(1, inf) clips nothing."""
        norm, self.clipping_norm = self.clipping_norm, np.float64(self.clipping_norm)
        try:
            with np.errstate(divide="ignore"):
                return super().aggregate_train(server_round, replies)
        finally:
            self.clipping_norm = norm  # a checkpoint holds plain numbers


class ClientSideClipping(DifferentialPrivacyClientSideFixedClipping):
    """Flower's, for arrays that it does clip."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Flower's, see `_refuse_scalars`."""
        _refuse_scalars(arrays)
        return super().configure_train(server_round, arrays, config, grid)


def _refuse_scalars(arrays: ArrayRecord) -> None:
    """Flower 1.41 clips in place, which does nothing to a number of shape []: it would go out at full size."""
    for key, array in arrays.items():
        if not array.shape:
            raise ValueError(
                f"{key} has shape [], which Flower's clipping leaves as it is; give it shape [1] or keep it private "
                "when dp is on"
            )


def make_private(strategy: FedAvg, dp: DpSettings, sampled: int, population: int) -> Strategy:
    """The strategy inside Flower's wrapper for fixed clipping.

    Args:
        strategy: what aggregates the clipped replies.
        dp: the settings.
        sampled: clients sampled each round, exactly, see `num_sampled`.
        population: clients that may take part.

    Raises:
        ValueError: accounting for a strategy that does not take the plain mean.
    """
    if dp.accounting and type(strategy).aggregate_train is not FedAvg.aggregate_train:
        raise ValueError(
            f"epsilon cannot be counted for {type(strategy).__name__}: the noise is measured out for a plain mean, in "
            "which one client moves the result by clipping_norm / clients at most; use fedavg, or accounting=False "
            "for noise without a statement about privacy"
        )
    accountant = RdpAccountant(_config(dp, population)) if dp.accounting else None
    cls = ServerSideClipping if dp.side == "server" else ClientSideClipping
    return cls(strategy, dp.noise_multiplier, dp.clipping_norm, sampled, accountant=accountant)


def _config(dp: DpSettings, population: int) -> PrivacyConfig:
    """Sampling is not counted in our favour: Flower's fixed clipping takes no amplification."""
    return PrivacyConfig(
        target_delta=dp.delta,
        population_size=population,
        neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=SamplingMethod.NO_AMPLIFICATION,
        max_epsilon=dp.max_epsilon,
    )


def num_sampled(fraction_train: float, quorum: int, population: int) -> int:
    """Clients sampled each round under differential privacy; all of them must be connected and reply.

    Formula: `max(int(population fraction_train), quorum)`, as Flower counts when everybody is connected.
    """
    return max(int(population * fraction_train), quorum)


def client_mods(dp: DpSettings | None) -> list[Mod]:
    """What a client wraps around its app: Flower's clipping if the client clips, else nothing.

    Flower's mod pairs arrays by position and wants the keys it sent, so such a client may not reply with factors.
    """
    return [clip] if dp is not None and dp.side == "client" else []


def clip(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower's clipping of a client's reply, which divides by the norm of the update; a zero update stays as it is."""
    replies: list[Message] = []

    def answered(message: Message, context: Context) -> Message:
        replies.append(call_next(message, context))
        return replies[0]

    try:
        return fixedclipping_mod(message, context, answered)
    except ZeroDivisionError:
        if not replies:  # not the clipping's: local training divided by zero
            raise
        return replies[0]


def needs_equal_weights(dp: DpSettings | None) -> bool:
    """Whether clients must all report the same number of examples, say 1."""
    return dp is not None and dp.accounting


def privacy_spent(strategy: Strategy) -> dict[str, Any] | None:
    """Epsilon so far, with delta and the number of releases; None where nobody counts."""
    layer: Any = strategy
    while layer is not None:
        spent = layer.privacy_spent() if hasattr(layer, "privacy_spent") else None
        if spent is not None:
            return dataclasses.asdict(spent)
        layer = getattr(layer, "strategy", None)
    return None
