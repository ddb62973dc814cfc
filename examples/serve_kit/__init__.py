"""What `serve_many_tasks.py` (`make demo-serve`) needs around its requests: an adapter, a server, a table.

The server runs as users run it: another process, reached over HTTP and stopped by SIGTERM, after which it finishes what
it has begun.
"""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from alora_kernels import data
from alora_kernels.adapters.cards import TaskCard, write_task_cards
from alora_kernels.adapters.writer import save_adapter
from alora_kernels.federated.deploy.processes import Process, Processes, free_port, last_lines
from alora_kernels.recipes import display
from alora_kernels.recipes.demo import RECIPE
from alora_kernels.text import percentile, printable
from alora_kernels.tuner import ALoRAConfig, ALoRALayer

HOST = "127.0.0.1"
STARTING, STOPPING = 180.0, 30.0  # seconds: to load a model, to finish what runs
LAST = 15  # lines of the log that an error quotes
TRAINED = Path(RECIPE.output) / "adapter"
PAGE = f"http://{HOST}:8000/"  # where `alora serve` has it when it is started by hand
TASKS = tuple(str(task) for task in RECIPE.tasks)
NOTHING = "its A and B are random: the answers mean nothing (train one with `make demo`)"


@dataclass(frozen=True)
class Answer:
    """One request that was answered."""

    task: str | None  # None is the base alone
    text: str
    tokens: int
    seconds: float  # from sending the request to the end of the answer
    first: float | None = None  # to the first token; None where the answer came in one piece


def adapter_folder(model: str, output: str | os.PathLike[str]) -> tuple[Path, str]:
    """Folder of the demo's adapter if it is of this model, or of a random one made in `output`; what to know of it."""
    if model == RECIPE.model and (TRAINED / "adapter_config.json").exists():
        return TRAINED, f"trained by `make demo` on {', '.join(TASKS)}"
    folder = Path(output) / f"random-adapter-{Path(model).name}"
    if not (folder / "adapter_config.json").exists():
        _random_adapter(model, folder)
    return folder, NOTHING


def _random_adapter(model: str, folder: Path) -> None:
    """An ALoRA adapter for the demo's tasks, strong enough that each of them answers in its own way."""
    display.quiet()
    torch.manual_seed(0)
    config = ALoRAConfig(r=8, tasks=list(TASKS), target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    adapted: Any = get_peft_model(data.load_model(model)[0], config)
    with torch.no_grad():
        for layer in adapted.modules():
            if isinstance(layer, ALoRALayer):
                layer.asymlora_B["default"].weight.normal_(std=0.1)
    save_adapter(adapted, folder)
    write_task_cards(folder, {task: TaskCard(data.TASKS[task].template, data.TASKS[task].labels) for task in TASKS})


def prompts(count: int) -> list[tuple[str | None, str]]:
    """`count` real test prompts with the task each is for: the demo's tasks in turn, then the base (None)."""
    texts = {task: data.load_task(task, train_size=0, test_size=count)["test"]["prompt"] for task in TASKS}
    turn: list[str | None] = [*TASKS, None]
    asked = [turn[i % len(turn)] for i in range(count)]
    return [(task, texts[task or TASKS[0]][i // len(turn)]) for i, task in enumerate(asked)]


@contextmanager
def served(model: str, adapter: Path, log: Path) -> Iterator[tuple[str, Process]]:
    """`alora serve` on a free port of this machine until the end of the block: its address and process.

    `log`, a file whose name ends in `.log`, gets all that it prints; a RuntimeError quotes its end if the server ended,
    or did not answer in three minutes.
    """
    port = free_port()
    address, command = f"http://{HOST}:{port}", [sys.executable, "-m", "alora_kernels", "serve", model]
    command += ["--adapter", str(adapter), "--host", HOST, "--port", str(port)]
    log.unlink(missing_ok=True)
    with Processes(log.parent) as processes:
        process = processes.start(log.stem, command, os.environ)
        _wait_ready(process, f"{address}/health")
        yield address, process
        if (code := process.exit_code) is not None:
            raise _failed(f"the server ended by itself with exit code {code}", process.log)
        process.stop(STOPPING)
        if (code := process.exit_code) not in (0, -signal.SIGTERM, 128 + signal.SIGTERM):
            raise _failed(f"the server ended with exit code {code} after SIGTERM", process.log)


def _wait_ready(process: Process, url: str) -> None:
    for code in process.looks(STARTING):
        if code is not None:
            raise _failed(f"the server ended with exit code {code} before it was ready", process.log)
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
    raise _failed(f"no answer from {url} after {STARTING:.0f} s", process.log)


def _failed(message: str, log: Path) -> RuntimeError:
    return RuntimeError(f"{message}; {log} ends with:\n{last_lines(log, LAST)}")


def show(answers: Sequence[Answer], seconds: float) -> dict[str, int]:
    """Print a line per task and one for all, which took `seconds` together; requests by task, the base as "base"."""
    by_task: dict[str, list[Answer]] = {}
    for answer in answers:
        by_task.setdefault(answer.task or "base", []).append(answer)
    tokens = sum(answer.tokens for answer in answers)
    rows = [[*_numbers(name, same), printable(" ".join(same[0].text.split()), 24)] for name, same in by_task.items()]
    table = display.table(
        "one base model, one server, a task per request",
        ("task", "requests", "tokens", "first token", "answer", "for example"),
        [*rows, [*_numbers("all", answers), ""]],
        f"{len(answers)} requests at once, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s\n"
        "first token: p50 / p95, of streamed answers; answer: p50; from sending on, waiting included",
    )
    table.columns[-1].justify = "left"
    display.console.print(table)
    return {name: len(same) for name, same in by_task.items()}


def _numbers(name: str, answers: Sequence[Answer]) -> list[str]:
    firsts = [answer.first for answer in answers if answer.first is not None]
    first = f"{1e3 * percentile(firsts, 0.5):.0f} / {1e3 * percentile(firsts, 0.95):.0f} ms" if firsts else ""
    tokens = sum(answer.tokens for answer in answers)
    whole = percentile((answer.seconds for answer in answers), 0.5)
    return [name, str(len(answers)), str(tokens), first, f"{whole:.2f} s"]


def memory(address: str) -> str:
    """What the server says its tasks take, in one line."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=5) as reply:
        lines = [line.split() for line in reply.read().decode().splitlines() if line.startswith("alora_bytes_")]
    numbers = {name: float(value) / 1e6 for name, value in lines}
    task, shared = numbers["alora_bytes_per_task"], numbers["alora_bytes_shared"]
    lora = task + shared
    return f"{task:.2f} MB per task and {shared:.2f} MB once for the shared B; a LoRA per task takes {lora:.2f} MB"
