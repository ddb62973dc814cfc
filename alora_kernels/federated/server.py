"""The server's side of a run: a Flower strategy inside a guard, with a ledger and a checkpoint after every round.

From a grid to the clients, the run's `FedConfig` and a `Template` to an `Outcome` and, in `config.output`, the ledger,
`server.safetensors` (each round) and `final.safetensors`. Every engine calls `serve` with its own grid.
"""

from __future__ import annotations

import logging
import math
import random
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import PrivacyBudgetExhausted
from torch import nn

from .. import files
from . import model as adapters
from . import state, wire
from .config import FedConfig
from .guard import GuardedGrid, QuorumError
from .log import LEDGER, Ledger, Outcome, read
from .strategies import build_strategy, privacy_spent, quiet_flower

PLOT = "rounds.png"


@dataclass(frozen=True)
class Template:
    """What the server knows of the model: one adapted as the clients' are, and the `fingerprint` of its base."""

    model: nn.Module
    base: str


def serve(
    grid: Grid, config: FedConfig, template: Template, *, resume: bool = False, engine: str = "in-process"
) -> Outcome:
    """Run a federated training over a grid to its last round, or until it has to stop.

    Arguments, outcome and errors as `local.run`; `engine` is for the ledger. The server never holds a client's private
    half, nor data.
    """
    status = "stopped"
    reason: str | None = "interrupted"
    # Flower samples and draws noise with the process's generators
    with files.claimed(config.output), quiet_flower(logging.WARNING), adapters.generators_kept():
        run = _Run(config, template, resume)
        with Ledger(config.output / LEDGER, resume_from=run.done if resume else None) as ledger:
            try:
                ledger.write(run.event(engine))
                if not resume:
                    run.save(0, run.arrays)
                guard = GuardedGrid(grid, run.spec, config.guard, run=run.token, on_event=ledger.write)
                run.play(guard, ledger)
                run.judge(guard)
                status, reason = "finished", None
            except (QuorumError, PrivacyBudgetExhausted, FloatingPointError, OSError) as error:
                reason = str(error)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                raise
            finally:
                with suppress(OSError):  # a full disk is the outcome's reason already
                    ledger.write({"event": "end", "round": run.done, "status": status, "reason": reason})
    arrays = wire.from_record(run.arrays, run.spec)
    if run.done == config.rounds:
        said = {"method": config.method, "spec": run.spec.digest, "round": str(run.done)}
        files.write(config.output / state.FINAL, arrays, said)
    return Outcome(status, reason, run.done, arrays, read(config.output / LEDGER))


def check_fresh(folder: Path) -> None:
    """Raise FileExistsError, which names the ways out, if the folder holds a run, finished or not."""
    ledger = folder / LEDGER
    begun = ledger.exists() and any(event["event"] not in ("run", "end") for event in read(ledger))
    if begun or (folder / state.CHECKPOINT).exists():
        raise FileExistsError(
            f"{folder} holds a run already: go on with --resume, replace it with --overwrite, or choose another output"
        )


def clear(folder: Path) -> None:
    """Remove a run from its folder: ledger, checkpoint, results and the private halves kept there."""
    with files.claimed(folder):
        for name in (LEDGER, state.CHECKPOINT, state.FINAL, PLOT):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / state.CLIENTS, ignore_errors=True)


class _Run:
    """Where a run stands: begun afresh, or as the checkpoint in its folder says; moves on after every round."""

    def __init__(self, config: FedConfig, template: Template, resume: bool) -> None:
        self.config, self.template, self.resumed = config, template, resume
        self.spec = adapters.agreement(template.model, config, template.base)
        if config.dp is not None and (
            key := next((k for k, (_, shape) in self.spec.arrays.items() if not shape), None)
        ):
            raise ValueError(  # Flower 1.41 clips in place, which does nothing to it: it would go out at full size
                f"{key} has shape [], which Flower's clipping leaves as it is; give it shape [1] or keep it private "
                "when dp is on"
            )
        chosen, quorum = config.strategy, config.guard.quorum
        self.strategy = build_strategy(
            chosen.name, chosen.options, quorum=quorum, dp=config.dp, population=len(config.clients)
        )
        if resume:
            saved = state.load(config.output)
            if saved.spec_hash != self.spec.digest:
                raise state.CheckpointError(
                    f"{config.output} was made with another method, model, rank or seed: resume with the same "
                    "configuration"
                )
            state.restore(saved, self.strategy)
            self.token, self.done, self.arrays = saved.run, saved.round, wire.to_record(saved.arrays)
        else:
            check_fresh(config.output)
            (config.output / LEDGER).unlink(missing_ok=True)  # killed before its first checkpoint: nothing happened
            random.seed(adapters.seed_of(config.seed, "sampling"))
            if config.dp is not None:
                np.random.seed(None)  # noise that somebody could draw again hides nothing
            self.token, self.done = secrets.token_hex(8), 0
            self.arrays = wire.to_record(adapters.values(template.model, config.spec, "shared"))

    def save(self, done: int, arrays: ArrayRecord) -> None:
        """Move on to a round whose checkpoint is on the disk."""
        said = {"spec_hash": self.spec.digest, "run": self.token}
        state.save(self.config.output, round=done, arrays=arrays, strategy=self.strategy, **said)
        self.done, self.arrays = done, arrays

    def play(self, guard: GuardedGrid, ledger: Ledger) -> None:
        """The rounds that are left, as Flower's `start` plays them; that one would count from 1 again."""
        first, grid = self.done, cast(Grid, guard)
        for round_ in range(first + 1, self.config.rounds + 1):
            messages = self.strategy.configure_train(round_, self.arrays, ConfigRecord(self._terms()), grid)
            replies = guard.send_and_receive(messages)
            arrays = self.strategy.aggregate_train(round_, replies)[0] or self.arrays
            self._check_finite(round_, arrays)
            if spent := privacy_spent(self.strategy):
                ledger.write({"event": "privacy", "round": round_, **spent})
            self.save(round_, arrays)
        if guard.nothing_done is not None:  # a resumption plays these rounds again
            self.save(first, self.arrays)
            raise guard.nothing_done

    def _check_finite(self, round_: int, arrays: ArrayRecord) -> None:
        """A FloatingPointError if an aggregation made no numbers of finite replies; the last round stays saved."""
        if (key := wire.not_finite({k: array.numpy() for k, array in arrays.items()})) is not None:
            raise FloatingPointError(
                f"the strategy {self.config.strategy.name} made values that are not finite of the replies of round"
                f" {round_} ({key}): round {self.done} is kept; check the strategy's options (qfedavg takes a power"
                " of its train_loss_key, which must not be negative)"
            )

    def judge(self, guard: GuardedGrid) -> None:
        """Every client judges the last shared arrays, which no round did, and saves its finished adapter."""
        terms = ConfigRecord({**self._terms(), wire.ROUND: self.done, wire.LAST: True})
        content = RecordDict({wire.ARRAYS: self.arrays, wire.CONFIG: terms})
        messages = [Message(content, node, MessageType.EVALUATE) for node in guard.get_node_ids()]
        guard.send_and_receive(messages)

    def _terms(self) -> dict[str, Any]:
        return {wire.METHOD: self.config.method, wire.BASE: self.spec.base, wire.SCALING: self.config.scaling}

    def event(self, engine: str) -> dict[str, Any]:
        """What the ledger says once about a run, the bytes that each round must take by the formulas among it."""
        config, model = self.config, self.template.model
        layers, own = adapters.layer_shapes(model, config.spec), adapters.matrices(model, config.spec)
        size = 8 if any(dtype == "float64" for dtype, _ in self.spec.arrays.values()) else 4
        # no formula of the papers counts heads
        heads = size * sum(math.prod(shape) for key, (_, shape) in self.spec.arrays.items() if own[key].role == "head")
        floats = {c.name: config.spec.floats(layers, config.rank_of(c.name), config.d_m) for c in config.clients}
        return {
            "event": "run",
            "run": self.token,
            "method": config.method,
            "engine": engine,
            "spec": self.spec.digest,
            "rounds": config.rounds,
            "clients": [client.name for client in config.clients],
            "metric": config.metrics[0],
            "higher_is_better": True,
            "aggregation": config.spec.aggregation,
            "strategy": config.strategy.name,
            "seed": config.seed,
            "shared_keys": len(self.spec.arrays),
            "bytes_down": {name: size * down + heads for name, (_, down) in floats.items()},
            "bytes_up": {name: size * up + heads for name, (up, _) in floats.items()},
            "versions": {name: metadata.version(name) for name in ("flwr", "torch", "peft")},
            "resumed_at": self.done if self.resumed else None,
        }
