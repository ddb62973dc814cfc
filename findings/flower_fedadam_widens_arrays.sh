#!/usr/bin/env bash
# Flower: one round of six built-in strategies over float32 arrays, two clients, with NumPy 2.
# Guess: what comes back has the dtype that was sent, so every round moves the same bytes.
# Seen: FedAdam and QFedAvg give float64, the other four float32. A NumPy number of float64 (the bias-corrected rate, a
# power of the loss) is no weak scalar under NumPy 2 and widens the arrays it meets. From round 2 on twice the bytes
# travel, and a client that loads what it gets without a cast trains in float64 or refuses.
# Guard: strategies are wrapped so that keys, shapes and dtypes stay
# (tests/federated/test_fed_strategies.py::test_every_strategy_keeps_keys_shapes_and_dtype).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet flwr==1.41.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
import logging
from importlib.metadata import version

import flwr.serverapp.strategy as flower
import numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # as in a server's process


class Nodes:
    """Of a grid a strategy asks only who is there."""

    def get_node_ids(self):
        return [1, 2]


def reply(message):
    """The client adds its number to what it got."""
    sent = message.content["arrays"]["w"].numpy()
    arrays = ArrayRecord({"w": Array(sent + sent.dtype.type(message.metadata.dst_node_id))})
    metrics = MetricRecord({"num-examples": 3, "loss": 0.5})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


names = {"FedAvg": {}, "FedAvgM": {}, "FedAdam": {}, "FedAdagrad": {}, "FedYogi": {}}
names["QFedAvg"] = {"client_learning_rate": 0.1, "train_loss_key": "loss"}
start = ArrayRecord({"w": Array(numpy.ones((2, 3), numpy.float32))})
found = {}
for name, options in names.items():
    strategy = getattr(flower, name)(fraction_evaluate=0.0, **options)
    messages = strategy.configure_train(1, start, ConfigRecord({}), Nodes())
    arrays, _ = strategy.aggregate_train(1, [reply(message) for message in messages])
    found[name] = arrays["w"].dtype
    print(f"flwr {version('flwr')}, NumPy {numpy.__version__}: float32 through {name} is {found[name]}")
raise SystemExit({name for name, dtype in found.items() if dtype == "float64"} != {"FedAdam", "QFedAvg"})
PYTHON
