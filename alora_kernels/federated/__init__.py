"""Fine-tune together without sharing data: Fed-ALoRA, FedSA-LoRA, FFA-LoRA and FedIT, thin on Flower.

From a `FedConfig` (method, clients, rounds) and a `Participant` per client (its model and its data) to an `Outcome`; in
the output folder a ledger, a checkpoint each round and the finished shared arrays. Users call `run`; on the command
line it is `alora fed ...`, with Flower `flwr run`.

    share_specs, config        what each method shares, as data; one run as data
    model, wire                base model -> client's model, its matrices by role; what travels, agreed on by a hash
    client, state              one client's round; what survives a kill, on either side
    guard, strategies, server  Flower's strategy inside a guard, durable
    log, view                  what happened: written by the server only, shown by everybody else
    local, deploy              the engines: one process; Flower's simulation and real machines

Importing this opens no socket. Flower's telemetry and update check are switched off before it is imported, unless the
environment already says otherwise.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .._lazy import names_later
from ..text import install

ENVIRONMENT = {  # no telemetry, no look for updates, no `pip install` when a run starts
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

if TYPE_CHECKING:
    from . import log, server, view
    from .client import Participant, fit, shuffled
    from .config import ConfigError, FedConfig, Limits, load_config
    from .local import run
    from .log import Outcome
    from .model import adapt, fingerprint
    from .server import Template
    from .share_specs import METHODS, ShareSpec, share_spec

_WHERE = {
    "METHODS": "share_specs", "ShareSpec": "share_specs", "share_spec": "share_specs",
    "ConfigError": "config", "FedConfig": "config", "Limits": "config", "load_config": "config",
    "Participant": "client", "fit": "client", "shuffled": "client",
    "Outcome": "log", "Template": "server", "adapt": "model", "fingerprint": "model", "run": "local",
    "log": "log", "server": "server", "view": "view",
}  # fmt: skip
REMEDY = f"federated training needs Flower: {install('federated')}"

__all__ = [
    "METHODS", "ConfigError", "FedConfig", "Limits", "Outcome", "Participant", "ShareSpec", "Template", "adapt",
    "fingerprint", "fit", "load_config", "log", "run", "server", "share_spec", "shuffled", "view",
]  # fmt: skip

__getattr__ = names_later(__name__, _WHERE, needs=("flwr", "pydantic"), remedy=REMEDY)
