"""Fine-tune together without sharing data: Fed-ALoRA, FedSA-LoRA, FFA-LoRA and FedIT, thin on Flower.

In:   a `FedConfig` (method, clients, rounds) and a `Participant` per client (its model and its data).
Out:  an `Outcome`; in the output folder a ledger, a checkpoint each round and the finished shared arrays.
Who:  users in Python (`run`), the command line (`alora fed ...`), Flower (`flwr run`).

    methods, seeds, names             what each method shares, as data; initial values
    wire                what travels, agreed on by a hash
    adapters            base model -> client's model; its matrices by role
    participant, client, store        one client: model and data, a round, the private half on disk
    strategies, guard, checkpoint, server, outcome    Flower's strategy inside a guard, durable
    ledger, summary, live, plot       what happened: written by the server only, shown by everybody else
    inprocess, engine, flower         the engines: one process, Flower's simulation, real machines

Importing this opens no socket. Flower's telemetry and update check are switched off before it is imported, unless the
environment already says otherwise.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._lazy import names_later

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

if TYPE_CHECKING:
    from .config import ConfigError, FedConfig, load_config
    from .engine import run
    from .guard import Limits
    from .log import Outcome
    from .model import adapt, fingerprint
    from .participant import Participant, fit, shuffled
    from .server import Template
    from .share_specs import METHODS, ShareSpec, share_spec

_WHERE = {
    "METHODS": "share_specs",
    "ConfigError": "config",
    "FedConfig": "config",
    "Limits": "guard",
    "Outcome": "log",
    "Participant": "participant",
    "ShareSpec": "share_specs",
    "Template": "server",
    "adapt": "model",
    "fingerprint": "model",
    "fit": "participant",
    "load_config": "config",
    "run": "engine",
    "share_spec": "share_specs",
    "shuffled": "participant",
}

__all__ = [
    "METHODS",
    "ConfigError",
    "FedConfig",
    "Limits",
    "Outcome",
    "Participant",
    "ShareSpec",
    "Template",
    "adapt",
    "fingerprint",
    "fit",
    "load_config",
    "run",
    "share_spec",
    "shuffled",
]

__getattr__ = names_later(
    __name__,
    _WHERE,
    needs=("flwr", "pydantic"),
    remedy="federated training needs Flower: pip install 'alora-kernels[federated]'",
)
