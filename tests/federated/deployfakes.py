"""A federation so small that only the transport is left: what the deployment tests run as processes.

Client i sends `0.5 sent + i` with weight 1, 1, 2. Halves and quarters are exact in float32, so every engine must give
the same bits, in whatever order the replies come.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

WEIGHTS = (1, 1, 2)
SHAPE = (2, 3)

server, client = ServerApp(), ClientApp()


def settings(output: Path, *, rounds: int = 2, least: int = 3, **extra: Any) -> str:
    """Text of a configuration: how many rounds, how many clients at least, and what goes wrong."""
    return yaml.safe_dump({"output": str(output), "rounds": rounds, "least": least, **extra})


@server.main()
def serve(grid: Grid, context: Context) -> None:
    config = yaml.safe_load(str(context.run_config["config"]))
    if config.get("crash"):
        raise RuntimeError("the toy server crashes as it was told")
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=config["least"], min_available_nodes=config["least"])
    start = ArrayRecord({"B": Array(np.zeros(SHAPE, np.float32))})
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=config["rounds"])
    output = Path(config["output"])
    output.mkdir(parents=True, exist_ok=True)
    np.save(output / "final.npy", result.arrays["B"].numpy())


@client.train()
def train(message: Message, context: Context) -> Message:
    config = yaml.safe_load(str(context.run_config["config"]))
    number = int(str(context.node_config.get("client", context.node_config.get("partition-id"))).split("-")[-1])
    output = Path(config["output"])
    output.mkdir(parents=True, exist_ok=True)
    stalled = output / "stalled"
    if config.get("stalls") == number and not stalled.exists():  # once: started again, it works
        stalled.touch()
        time.sleep(600)  # until it is killed
    with (output / f"took-part-{number}").open("a") as seen:
        seen.write(f"{sorted(context.node_config)}\n")
    array = np.asarray(message.content["arrays"]["B"].numpy() * np.float32(0.5) + np.float32(number), np.float32)
    reply = {"arrays": ArrayRecord({"B": Array(array)}), "metrics": MetricRecord({"num-examples": WEIGHTS[number]})}
    return Message(RecordDict(reply), reply_to=message)


def by_hand(rounds: int, numbers: Iterable[int] = range(3)) -> np.ndarray:
    """The same rounds without any transport: B <- sum_i w_i (0.5 B + i) / sum_i w_i."""
    numbers = list(numbers)
    value, total = 0.0, sum(WEIGHTS[i] for i in numbers)
    for _ in range(rounds):
        value = sum(WEIGHTS[i] * (0.5 * value + i) for i in numbers) / total
    return np.full(SHAPE, value, np.float32)
