"""An earlier commit's package as a provider: a venv of its own, and a worker that steps on demand.

Rows call it "today's build", its name when the first of them were taken.

The venv borrows torch and all else from this environment, so nothing is downloaded. While one side steps the other
waits for a line in a pipe: it sleeps, and OpenMP's threads spin for about a millisecond after their last product.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ..report.rows import ROOT
from . import worker

BUILD = "today's build"
COMMIT = "2602ef3"  # main before the work on CPUs
STRIDED = 2e-3  # it adds the softmax up along a stride: a gradient is off by 8e-4 for 49,152 words, 1e-3 for 128,256
STAMP = "alora-kernels-commit"


def install(commit: str, folder: Path) -> Path:
    """The Python of a venv in `folder`, made if need be, with this commit's package and all other packages of ours."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "alora_kernels"], capture_output=True)
    except OSError as error:
        raise ValueError(f"git is needed to read commit {commit}: {error}") from None
    if done.returncode:
        raise ValueError(f"git has no commit {commit} with this package: {done.stderr.decode().strip()}")
    python, stamp = folder / "bin" / "python", folder / STAMP
    if folder.exists() and any(folder.iterdir()) and not stamp.exists():
        raise ValueError(f"{folder} was not made by this command: name an empty or a new folder")
    if stamp.exists() and stamp.read_text() == commit:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
    packages = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # its own .pth files are not read
    with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
        archive.extractall(packages, filter="data")
    stamp.write_text(commit)
    return python


def missing(name: str, python: Path | None) -> str | None:
    if name != BUILD or python is not None:
        return None
    return "needs --build-venv DIR, the folder in which it is or will be installed"


@dataclass
class Worker:
    """A process with one job of a script, started when needed, of a Python or of this one and this checkout."""

    job: dict[str, Any]
    python: Path | None = None
    script: str = worker.__file__
    unset: Sequence[str] = ()  # variables of the environment that it must not see
    peak_mb: float = field(default=0.0, init=False)  # of the process, up to its last step

    @cached_property
    def _folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="bench-worker-")

    @cached_property
    def _process(self) -> subprocess.Popen[str]:
        folder = Path(self._folder.name)
        torch.save({"threads": torch.get_num_threads()} | self.job, folder / "job.pt")
        own = {"PYTHONPATH": "" if self.python else str(ROOT), "HF_HUB_OFFLINE": "1"}
        env = {name: value for name, value in os.environ.items() if name not in self.unset} | own
        command = [str(self.python or sys.executable), "-P", self.script, str(folder / "job.pt")]
        with (folder / "log").open("w") as log:
            return subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def ask(self, line: str) -> dict[str, float]:
        """Send a line, wait for its answer; RuntimeError with the end of its log if it died."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended, and its log says why
        if not (answer := process.stdout.readline()):
            said = (Path(self._folder.name) / "log").read_text(errors="replace").split()
            raise RuntimeError(f"the worker ended with exit code {process.wait()}: ... {' '.join(said[-40:])}")
        return json.loads(answer)  # type: ignore[no-any-return]

    def step(self) -> None:
        self.peak_mb = self.ask("step")["peak_mb"]

    def results(self) -> dict[str, Tensor]:
        file = Path(self._folder.name) / "results.pt"
        self.ask(str(file))
        return torch.load(file)  # type: ignore[no-any-return]

    def __del__(self) -> None:
        if "_process" in self.__dict__:
            self._process.communicate()  # closes its input
            self._folder.cleanup()
