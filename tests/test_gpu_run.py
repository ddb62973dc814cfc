"""A run on a GPU machine: what it needs to collect, who interprets, how a hung kernel ends, what `make gpu` does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from alora_kernels.kernels import tiles
from alora_kernels.ops.dispatch import interpreting
from tests.support import gpu_run

ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "triton", "transformers", "peft", "pytest")  # on a GPU machine, and what they bring along
LEAST = {"kernels": 400, "ops": 200, "modules": 2, "tuner": 20, "serving": 1}  # tests that such a run must find
COLLECT = """
import json, pytest, torch
torch.cuda.is_available = lambda: True

class Collected:
    def pytest_collection_finish(self, session):
        self.items = [item.nodeid for item in session.items]

seen = Collected()
code = pytest.main(["-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"], plugins=[seen])
print("\\n" + json.dumps([code, seen.items]))
"""


def closure(names: tuple[str, ...]) -> set[str]:
    """Installed packages that these need, without extras."""
    found, todo = set(), list(names)
    while todo:
        name = todo.pop().lower()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            parsed = [Requirement(line) for line in requires]
            todo += [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare_machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has only what is needed: links to those packages, and this repository."""
    folder = tmp_path_factory.mktemp("packages")
    for name in closure(NEEDED):
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__", "bin"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(package.locate_file(top))
    dropped = ("TRITON_INTERPRET", "PYTEST_", "ALORA_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_a_gpu_run_needs_five_packages(bare_machine):
    command = [sys.executable, "-S", "-c", COLLECT]
    done = subprocess.run(command, cwd=ROOT, env=bare_machine, capture_output=True, text=True, check=False)
    code, items = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rooms = Counter(item.split("/")[1] for item in items)
    assert all(rooms[room] >= least for room, least in LEAST.items()), rooms
    skipped = re.findall(r"^SKIPPED \[1\] (\S+?):\d+: (\S+) is not installed", done.stdout, re.MULTILINE)
    assert {"flwr", "datasets", "hypothesis"} <= {package for _, package in skipped}  # or nothing was hidden
    lost = {file for file, _ in skipped if is_for_gpus(ROOT / file)}
    assert {"/".join(file.split("/")[:2]) for file in lost} <= {"tests/analysis"}


def is_for_gpus(file: Path) -> bool:
    return file.is_dir() or re.search(r"mark\.gpu|def test_\w+\([^)]*\bdevice\b", file.read_text()) is not None


def test_only_a_package_that_may_be_missing_is_passed_over():
    def chain(name: str) -> Exception:
        outer = RuntimeError("collection")
        outer.__cause__ = ModuleNotFoundError(f"No module named {name!r}", name=name)
        return outer

    assert gpu_run.absent_package(chain("flwr.app")) == "flwr"
    for name in ("alora_kernels.kernel", "tests.supprt", "transformers.gone", "torch"):
        assert gpu_run.absent_package(chain(name)) is None
    assert gpu_run.absent_package(ImportError("cannot import name 'x'")) is None


def test_kernels_are_interpreted_only_where_torch_finds_no_gpu(monkeypatch):
    monkeypatch.setenv("PATH", "")  # nvidia-smi is not asked
    alone, with_gpu, chosen = {}, {}, {"ALORA_WAIT_TURNS": "7"}
    gpu_run.prepare(alone, has_gpu=False)
    gpu_run.prepare(with_gpu, has_gpu=True)
    gpu_run.prepare(chosen, has_gpu=True)
    assert alone == {"TRITON_INTERPRET": "1"}
    assert with_gpu == {"ALORA_WAIT_TURNS": str(gpu_run.TURNS)} and chosen == {"ALORA_WAIT_TURNS": "7"}


def test_an_interpreted_run_cannot_pass_for_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    assert tiles._device_chip.__wrapped__(torch.device("cuda", 0)) == "interpreter"


@pytest.mark.gpu
def test_kernels_are_compiled_for_this_gpu():
    assert not interpreting()
    assert tiles.chip_of(torch.device("cuda", 0)) != "interpreter"


HANGS = """
import itertools, pytest

@pytest.mark.timeout(0.5)
def test_hangs():
    any(itertools.repeat(False))  # in C, with the interpreter's lock, and deaf to signals
"""
WATCHED = """
import sys, pytest
from types import SimpleNamespace
sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))  # all that it is asked
from tests.support import gpu_run
gpu_run.GRACE = 0.5
sys.exit(pytest.main(sys.argv[1:], plugins=[gpu_run]))
"""


@pytest.mark.parametrize("options", [(), ("-p", "pytest_timeout")], ids=["alone", "beside pytest-timeout"])
def test_what_hangs_ends_the_process_and_says_where(tmp_path, options):
    file = tmp_path / "test_it.py"
    file.write_text(HANGS)
    command = [sys.executable, "-c", WATCHED, "-c", os.devnull, "--rootdir", str(tmp_path), *options, str(file)]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "in test_hangs" in done.stderr


@pytest.mark.parametrize(
    ("mark", "option", "seconds"),
    [
        (pytest.mark.timeout(600), None, 600), (pytest.mark.timeout(timeout=7), 20, 7), (None, 20.0, 20),
        (None, 0, 0), (None, None, gpu_run.LIMIT),
    ],
)  # fmt: skip
def test_limits_are_those_of_pytest_timeout(request, monkeypatch, mark, option, seconds):
    if mark is not None:
        request.node.add_marker(mark)
    monkeypatch.setattr(request.config.option, "timeout", option, raising=False)
    assert gpu_run.seconds_of(request.node) == seconds


def make_gpu(folder: Path, red: str) -> tuple[int, str, list[str]]:
    """`make gpu` with a Python that only writes down what it was asked, and fails where `red` is part of it."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> {folder}/asked\ncase "$*" in {red}) exit 1;; esac\n')
    python.chmod(0o755)
    command = ["make", "-s", "gpu", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr, (folder / "asked").read_text().splitlines()


def test_every_stage_runs_after_a_red_one(tmp_path):
    code, said, asked = make_gpu(tmp_path, "*'alora_kernels tune'*|*test_races.py")
    assert code != 0 and "red: tune races" in said
    races = next(i for i, stage in enumerate(asked) if stage.endswith("-q tests/kernels/test_races.py"))
    assert len(asked) == 6 and races == 4  # after whatever a hung kernel could spoil, in a process of its own
    assert all("--ignore tests/kernels/test_races.py" in stage or "test_races" not in stage for stage in asked[:races])


def test_green_stages_make_a_green_run(tmp_path):
    code, said, asked = make_gpu(tmp_path, "nothing")
    assert code == 0 and "red" not in said and len(asked) == 6


def test_a_gpu_that_is_required_and_missing_is_an_error(monkeypatch, request):
    monkeypatch.setenv("ALORA_REQUIRE_GPU", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match="no CUDA or ROCm device"):
        gpu_run.pytest_configure(request.config)
