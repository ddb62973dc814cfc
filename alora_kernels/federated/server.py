"""The server's side of a run: a Flower strategy inside a guard, with a ledger and a checkpoint after every round.

In:   a grid to the clients, the run's `FedConfig`, and what the shared arrays look like (a `Template`).
Out:  `<output>/ledger.jsonl`, `server.safetensors` (each round), `final.safetensors`; an `Outcome`.
Who:  every engine calls `serve` with its own grid.

The loop is Flower's own `Strategy.start`. What is ours sits around it: `GuardedGrid` decides which replies it sees,
`FromRound` lets it begin at the round after the checkpoint, and `evaluate_fn`, which Flower calls after each
aggregation, writes the checkpoint. The server never holds a client's private half, nor data.
"""

from __future__ import annotations

import logging
import random
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import Strategy
from torch import nn

from .. import files
from . import checkpoint, wire
from . import model as adapters
from .client import BASE, FINAL, LAST, METHOD, SCALING, agreement
from .config import FedConfig
from .dp import privacy_spent
from .guard import GuardedGrid, QuorumError
from .log import Ledger, Outcome, read
from .seeds import seed_of
from .strategies import FromRound, build_strategy

LEDGER, PLOT = "ledger.jsonl", "rounds.png"
CLIENTS = "clients"  # folder of the private halves, of clients on this machine


@dataclass(frozen=True)
class Template:
    """What the server knows of the model.

    Attributes:
        model: an adapted model with the shapes of the clients' (its private half is not used).
        base: `adapters.fingerprint` of its base.
    """

    model: nn.Module
    base: str


@dataclass
class _Run:
    """Where a run stands: what `serve` begins or resumes, and moves on after every round."""

    token: str
    done: int
    arrays: ArrayRecord


def serve(
    grid: Grid, config: FedConfig, template: Template, *, resume: bool = False, engine: str = "in-process"
) -> Outcome:
    """Run a federated training to its last round, or until it has to stop.

    Args:
        grid: Flower's way to the nodes.
        config: the run.
        template: shapes and first values of what travels.
        resume: go on from the checkpoint in `config.output`.
        engine: for the ledger.

    Returns:
        The outcome; `status` is "stopped" when too few clients answered, the privacy budget is spent or the
        disk is full. The checkpoint then holds the last completed round and `resume` goes on from it.

    Raises:
        FileExistsError: the output folder holds a run and resume is False.
        CheckpointError: nothing to resume, or a checkpoint of another configuration.
    """
    with _quiet_flower(), _own_sampling():
        return _serve(grid, config, template, resume, engine)


def _serve(grid: Grid, config: FedConfig, template: Template, resume: bool, engine: str) -> Outcome:
    folder = config.output
    spec = agreement(config, template.model, template.base)
    strategy = build_strategy(
        config.strategy.name,
        config.strategy.options,
        quorum=config.guard.quorum,
        dp=config.dp,
        population=len(config.clients),
    )
    run = _begin(strategy, spec, template, config, resume)
    folder.mkdir(parents=True, exist_ok=True)
    status: str = "stopped"
    reason: str | None = "interrupted"
    with Ledger(folder / LEDGER, resume_from=run.done if resume else None) as ledger:
        try:
            ledger.write(_run_event(config, spec, template, run, engine, resume))
            if not resume:
                _save(config, spec, strategy, run)
            guard = GuardedGrid(grid, spec, config.guard, run=run.token, on_event=ledger.write)
            _rounds(guard, config, spec, strategy, run, ledger)
            _judge(guard, config, spec, run)
            status, reason = "finished", None
        except (QuorumError, PrivacyBudgetExhausted, OSError) as error:
            reason = str(error)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise
        finally:
            with suppress(OSError):  # a full disk is the outcome's reason already
                ledger.write({"event": "end", "round": run.done, "status": status, "reason": reason})
    arrays = wire.from_record(run.arrays, spec)
    if run.done == config.rounds:
        files.write(folder / FINAL, arrays, {"method": config.method, "spec": spec.digest, "round": str(run.done)})
    return Outcome(status, reason, run.done, arrays, read(folder / LEDGER))


def check_fresh(folder: Path) -> None:
    """Raise unless a new run may begin in this folder.

    Raises:
        FileExistsError: it holds a run, finished or not; names the ways out.
    """
    ledger = folder / LEDGER
    begun = ledger.exists() and any(event["event"] not in ("run", "end") for event in read(ledger))
    if begun or (folder / checkpoint.FILE).exists():
        raise FileExistsError(
            f"{folder} holds a run already: go on with --resume, replace it with --overwrite, or choose another output"
        )


def clear(folder: Path) -> None:
    """Remove a run from its folder: ledger, checkpoint, results and the private halves kept there."""
    for name in (LEDGER, checkpoint.FILE, FINAL, PLOT):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / CLIENTS, ignore_errors=True)


def _begin(strategy: Strategy, spec: wire.WireSpec, template: Template, config: FedConfig, resume: bool) -> _Run:
    """A fresh run, or the one in the folder."""
    folder = config.output
    if not resume:
        check_fresh(folder)
        (folder / LEDGER).unlink(missing_ok=True)  # killed before its first checkpoint: nothing has happened yet
        random.seed(seed_of(config.seed, "sampling"))
        if config.dp is not None:
            np.random.seed(None)  # noise that somebody could draw again hides nothing
        return _Run(secrets.token_hex(8), 0, wire.to_record(adapters.arrays_of(template.model, config.spec, "shared")))
    saved = checkpoint.load(folder)
    if saved.spec_hash != spec.digest:
        raise checkpoint.CheckpointError(
            f"{folder} was made with another method, model, rank or seed: resume with the same configuration"
        )
    checkpoint.restore(saved, strategy)
    return _Run(saved.run, saved.round, wire.to_record(saved.arrays))


def _rounds(
    guard: GuardedGrid, config: FedConfig, spec: wire.WireSpec, strategy: Strategy, run: _Run, ledger: Ledger
) -> None:
    """The rounds that are left."""
    first = run.done

    def after(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        if round_ > 0:
            spent = privacy_spent(strategy)
            if spent is not None:
                ledger.write({"event": "privacy", "round": first + round_, **spent})
            _save(config, spec, strategy, _Run(run.token, first + round_, arrays))
            run.done, run.arrays = first + round_, arrays
        return None

    if first < config.rounds:
        FromRound(strategy, first).start(
            grid=guard,
            initial_arrays=run.arrays,
            num_rounds=config.rounds - first,
            timeout=config.guard.deadline,
            train_config=ConfigRecord(_terms(config, spec)),
            evaluate_fn=after,
        )
    if guard.nothing_done is not None:  # a resumption plays these rounds again
        run.done = first
        _save(config, spec, strategy, run)
        raise guard.nothing_done


def _save(config: FedConfig, spec: wire.WireSpec, strategy: Strategy, run: _Run) -> None:
    checkpoint.save(
        config.output, round=run.done, arrays=run.arrays, spec_hash=spec.digest, run=run.token, strategy=strategy
    )


def _judge(guard: GuardedGrid, config: FedConfig, spec: wire.WireSpec, run: _Run) -> None:
    """Every client judges the last shared arrays, which no round did, and saves its finished adapter."""
    terms = ConfigRecord({**_terms(config, spec), wire.ROUND: run.done, LAST: True})
    content = RecordDict({wire.ARRAYS: run.arrays, wire.CONFIG: terms})
    messages = [Message(content, node, MessageType.EVALUATE) for node in guard.get_node_ids()]
    guard.send_and_receive(messages, timeout=config.guard.deadline)


def _terms(config: FedConfig, spec: wire.WireSpec) -> dict[str, Any]:
    return {METHOD: config.method, BASE: spec.base, SCALING: config.scaling}


def _run_event(
    config: FedConfig, spec: wire.WireSpec, template: Template, run: _Run, engine: str, resume: bool
) -> Mapping[str, Any]:
    """What the ledger says once about a run, the bytes that each round must take by the formulas among it."""
    from importlib import metadata

    layers = adapters.layer_shapes(template.model, config.spec)
    size, heads = _float_bytes(spec), _head_bytes(spec, template, config)
    floats = {c.name: config.spec.floats(layers, config.rank_of(c.name), config.d_m) for c in config.clients}
    return {
        "event": "run",
        "run": run.token,
        "method": config.method,
        "engine": engine,
        "spec": spec.digest,
        "rounds": config.rounds,
        "clients": [client.name for client in config.clients],
        "metric": config.metrics[0],
        "higher_is_better": True,
        "aggregation": config.spec.aggregation,
        "strategy": config.strategy.name,
        "seed": config.seed,
        "shared_keys": len(spec.arrays),
        "bytes_down": {name: size * down + heads for name, (_, down) in floats.items()},
        "bytes_up": {name: size * up + heads for name, (up, _) in floats.items()},
        "versions": {name: metadata.version(name) for name in ("flwr", "torch", "peft")},
        "resumed_at": run.done if resume else None,
    }


def _float_bytes(spec: wire.WireSpec) -> int:
    return 8 if any(dtype == "float64" for dtype, _ in spec.arrays.values()) else 4


def _head_bytes(spec: wire.WireSpec, template: Template, config: FedConfig) -> int:
    """Bytes of shared heads, which no formula of the papers counts."""
    own = adapters.matrices(template.model, config.spec)
    return sum(own[key].tensor.numel() * _float_bytes(spec) for key in spec.arrays if own[key].role == "head")


@contextmanager
def _quiet_flower() -> Iterator[None]:
    """Flower logs every step; the ledger and the live table say the same. Its warnings stay."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _own_sampling() -> Iterator[None]:
    """Flower samples with Python's generator and draws noise with NumPy's: the caller gets both back as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
