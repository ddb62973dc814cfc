"""The server under attack: a real `alora serve`, its process, its levels, and what its own counters say."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from alora_kernels.federated.deploy.processes import Process, free_port, wait_healthy

from ..report.rows import ROOT
from ..serving.load import HOST, STARTING

TAKEN = "alora_requests_taken_total"


@dataclass
class Server:
    """One `alora serve` after the other at the same port; `lives` counts them, `away` says that none is there."""

    model: str
    folders: Sequence[Path]
    root: Path  # below which tasks may be loaded
    home: Path
    request_timeout: float = 30.0
    port: int = field(default_factory=free_port)
    lives: int = 0
    away: bool = True

    def command(self) -> list[str]:
        """So few places that tasks move between the device, the memory and the disk all the time."""
        sizes = {"--resident": 12, "--host-tasks": 4, "--max-batch": 32, "--max-waiting": 400, "--max-context": 64}
        limits = {"--request-timeout": self.request_timeout}
        given = [part for pair in (*sizes.items(), *limits.items()) for part in pair]
        adapters = [part for folder in self.folders for part in ("--adapter", folder)]
        command = [sys.executable, "-m", "alora_kernels", "serve", self.model, *adapters, *given]
        return list(map(str, [*command, "--adapter-root", self.root, "--host", HOST, "--port", self.port]))

    def start(self) -> float:
        """Seconds until it is healthy."""
        begin, temporary = time.perf_counter(), self.home / "tmp"
        temporary.mkdir(parents=True, exist_ok=True)
        variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        variables |= {"TMPDIR": str(temporary), "XDG_STATE_HOME": str(temporary)}
        self.process = Process("serve", self.command(), os.environ | variables, self.home / "serve.log")
        self.lives += 1
        wait_healthy(self.process, f"http://{HOST}:{self.port}/health", seconds=STARTING)
        self.away = False
        return time.perf_counter() - begin

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """As a machine that loses power."""
        self.away = True
        self.signal(signal.SIGKILL)
        self.process.stop()

    @property
    def ended(self) -> bool:
        """Whether it is gone without having been killed here."""
        return not self.away and self.process.exit_code is not None

    def spilled(self) -> list[Path]:
        """Folders of rows that have no place in memory."""
        return sorted(path for path in (self.home / "tmp").rglob("*tasks-*") if path.is_dir())

    def levels(self) -> tuple[float, int]:
        """Resident MB and open descriptors."""
        process = psutil.Process(self.process.pid)
        return process.memory_info().rss / 1e6, process.num_fds()

    async def unaccounted(self) -> int | None:
        """Requests taken that have neither ended nor wait nor run, by its own counters; None if it counts none."""
        text = await asyncio.to_thread(_get, f"http://{HOST}:{self.port}/metrics")

        def total(name: str) -> int:
            return sum(int(float(line.rpartition(" ")[2])) for line in re.findall(rf"^{name}[ {{].*$", text, re.M))

        if not re.search(rf"^{TAKEN}[ {{]", text, re.M):
            return None
        ended, here = total("alora_requests_total"), total("alora_requests_waiting") + total("alora_requests_running")
        return total(TAKEN) - ended - here


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())
