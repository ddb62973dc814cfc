#!/usr/bin/env bash
# Flower's FedAvg over float16 arrays, the dtype that halves what travels: 1,000 clients of equal weight, one round.
# Guess: the mean is taken in float32 or better and rounded once, so it is right to half a unit of float16.
# Seen: it is summed in float16, a term of 1/1000 at a time: the mean of a thousand ones is 0.9785, of a thousand 3e-5 it
# is 6e-5. In float32 both are right to 4e-5 relative.
# Guard: what travels is float32 or wider, and a reply of another dtype is refused
# (tests/federated/test_fed_guard_bad_updates.py::test_is_refused_with_its_reason_and_the_mean_is_the_others).
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
        return list(range(1, 1001))


def mean(number, dtype):
    """What FedAvg makes of a thousand replies that all hold the same number."""
    strategy = flower.FedAvg(fraction_evaluate=0.0)
    array = ArrayRecord({"w": Array(numpy.full((2, 3), number, dtype))})
    messages = strategy.configure_train(1, array, ConfigRecord({}), Nodes())
    content = {"arrays": array, "metrics": MetricRecord({"num-examples": 1})}
    arrays, _ = strategy.aggregate_train(1, [Message(RecordDict(content), reply_to=message) for message in messages])
    return arrays["w"].numpy()[0, 0]


found = {}
for dtype in ("float16", "float32"):
    for number in (1.0, 3e-5):
        found[dtype, number] = mean(number, dtype)
        print(f"flwr {version('flwr')}, NumPy {numpy.__version__}: mean of 1,000 times {number} in {dtype}: {found[dtype, number]}")
right = [abs(value / number - 1) < 1e-3 for (_, number), value in found.items()]
raise SystemExit(right != [False, False, True, True])
PYTHON
