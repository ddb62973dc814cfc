#!/usr/bin/env bash
# Flower: one round of four built-in strategies over replies of ten small arrays, 4 and 20 clients; how often Python's
# garbage collector is run in full while they are aggregated.
# Guess: never; memory is given back by counting references, and the cost of a round is that of its arrays.
# Seen: FedAvg and FedAdam never, QFedAvg and Bulyan once for every reply. A full collection walks every object of the process,
# a third of a second where torch and transformers are imported: twenty replies of a few kB cost seconds.
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet flwr==1.41.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
import gc
import logging
from importlib.metadata import version

import flwr.serverapp.strategy as flower
import numpy
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # as in a server's process
calls = 0
collect = gc.collect


def counted(*generation):
    global calls
    calls += 1
    return collect(*generation)


def collections(name, clients, **settings):
    """Full collections while the replies of one round are aggregated."""
    global calls

    class Nodes:
        def get_node_ids(self):
            return list(range(1, clients + 1))

    strategy = getattr(flower, name)(fraction_evaluate=0.0, **settings)
    start = ArrayRecord({f"w{i}": Array(numpy.ones((2, 3), numpy.float32)) for i in range(10)})
    messages = strategy.configure_train(1, start, ConfigRecord({}), Nodes())
    content = [{"arrays": ArrayRecord(dict(message.content["arrays"])), "metrics": MetricRecord({"num-examples": 1, "loss": 0.5})} for message in messages]
    replies = [Message(RecordDict(record), reply_to=message) for record, message in zip(content, messages)]
    calls, gc.collect = 0, counted
    strategy.aggregate_train(1, replies)
    gc.collect = collect
    return calls


found = {}
for name in ("FedAvg", "FedAdam", "QFedAvg", "Bulyan"):
    options = {"QFedAvg": {"client_learning_rate": 0.1, "train_loss_key": "loss"}, "Bulyan": {"num_malicious_nodes": 0}}
    found[name] = [collections(name, clients, **options.get(name, {})) for clients in (4, 20)]
    print(f"flwr {version('flwr')}, {name}: {found[name][0]} full collections for 4 replies, {found[name][1]} for 20")
never, each = found["FedAvg"] + found["FedAdam"], (found["QFedAvg"], found["Bulyan"])
raise SystemExit(any(never) or not all(few >= 4 and many >= 20 for few, many in each))
PYTHON
