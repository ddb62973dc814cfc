"""Runs that are killed at a random moment and go on with --resume: they must end as the run that nobody disturbed.

The command runs in a process of its own that is forked from one that has imported everything: each start takes
milliseconds and not ten seconds, so most kills fall into the work and not into the imports. The kill is SIGKILL.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from safetensors.torch import load_file, save

from alora_kernels.federated.log import read
from alora_kernels.settings import write_yaml
from alora_kernels.tuner.config import WEIGHTS

from .arena import MODEL, Found

ROWS, STEPS, ROUNDS = 60, 12, 4
LIMIT = 240.0  # seconds a run may take
PRELOADED = (
    "alora_kernels.cli.app", "alora_kernels.recipes.train", "alora_kernels.recipes.federated",
    "alora_kernels.federated.view", "matplotlib.figure", "matplotlib.backends.backend_agg",
)  # fmt: skip


def command(args: Sequence[str], log: str) -> None:
    """In the new process: the command line, its output into a file."""
    with open(log, "a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        sys.argv = ["alora", *args]
        runpy.run_module("alora_kernels", run_name="__main__")


def forks() -> Any:
    """Processes forked from one that has imported what training needs, with a single thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", *PRELOADED])
    ready = context.Process(target=int)
    ready.start()
    ready.join()
    return context


def training(folder: Path, draw: Random, acts: int) -> Found:
    """`alora train`, killed and resumed; the adapter must be the same to the bit."""
    settings: dict[str, Any] = {
        "tasks": [{"name": "parity", "source": str(_rows(folder))}],
        "model": MODEL,
        "dtype": "float32",
    }
    settings |= {"steps": STEPS, "batch_size": 8, "test_size": 10, "r": 2, "save_steps": 2}
    recipe = _written(folder / "recipe.yaml", settings)
    return _killed(folder, draw, acts, ["train", str(recipe)], _adapter)


def federated(folder: Path, draw: Random, acts: int) -> Found:
    """`alora fed run`, killed and resumed; arrays and every client's numbers must be the same."""
    client = {"task": str(_rows(folder))}
    settings: dict[str, Any] = {
        "method": "fed-alora",
        "clients": {"one": client, "two": client},
        "model": MODEL,
        "rank": 2,
    }
    settings |= {"rounds": ROUNDS, "local_steps": 2, "batch_size": 4, "train_size": 40, "test_size": 10}
    config = _written(folder / "federated.yaml", settings)
    return _killed(folder, draw, acts, ["fed", "run", str(config)], _arrays)


def _killed(folder: Path, draw: Random, acts: int, args: list[str], result: Callable[[Path], str]) -> Found:
    context, log, found = forks(), str(folder / "log"), {"tried": acts, "survived": 0, "lost": 0, "wrong": 0}
    faults: list[str] = []

    def start(output: Path, *more: str) -> Any:
        process = context.Process(target=command, args=([*args, "--output", str(output), *more], log))
        process.start()
        return process

    def seconds(output: Path) -> float:
        begin, process = time.perf_counter(), start(output)
        process.join(LIMIT)
        if process.exitcode != 0:
            raise RuntimeError(f"{' '.join(args)} ended with {process.exitcode}: {Path(log).read_text()[-500:]}")
        return time.perf_counter() - begin

    whole = seconds(folder / "whole")
    right, underway = result(folder / "whole"), 0
    for act in range(acts):
        output = folder / f"run-{act}"
        process = start(output)
        process.join(draw.uniform(0.05, 1.0) * whole)
        underway += process.exitcode is None
        process.kill()
        process.join()
        again = _again(output, start)
        try:
            kind = "lost" if again else "survived" if result(output) == right else "wrong"
        except OSError as error:
            kind, again = "lost", str(error)
        found[kind] += 1
        if kind != "survived" and len(faults) < 3:
            faults.append(f"{kind}: {again or 'other numbers'}")
    note = f"a run takes {whole:.1f} s; {underway} of {acts} kills came before its end"
    return found | {"note": "; ".join([note, *faults])}


def _again(output: Path, start: Callable[..., Any]) -> str:
    """Start again as a user would, with --resume if there is something to go on from; why it failed, if it did."""
    resumable = any(output.glob("checkpoint-*")) or (output / "server.safetensors").exists()
    how = "--resume" if resumable else "--overwrite"
    process = start(output, how)
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
    return "" if process.exitcode == 0 else f"exit code {process.exitcode} after {how}"


def _adapter(output: Path) -> str:
    return _numbers(output / "adapter" / WEIGHTS)


def _numbers(file: Path) -> str:
    """Of all tensors in the order of their names; metadata may stand in any order."""
    return hashlib.sha256(save(load_file(file))).hexdigest()


def _arrays(output: Path) -> str:
    """The server's arrays, the clients' adapters, and what the ledger says of each client and round."""
    files = [output / "final.safetensors", *sorted(output.glob(f"clients/*/*/adapter/{WEIGHTS}"))]
    told = [[event.get(name) for name in ("round", "kind", "client", "before", "after", "metrics")]
            for event in read(output / "ledger.jsonl") if event["event"] == "client"]  # fmt: skip
    return json.dumps([[_numbers(file) for file in files], told])


def _rows(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    rows = [{"prompt": f"{i} is", "answer": "odd" if i % 2 else "even"} for i in range(ROWS)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _written(file: Path, settings: dict[str, Any]) -> Path:
    file.write_text(write_yaml(settings))
    return file
