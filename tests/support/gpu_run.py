"""What a run on a GPU needs besides the tests: who interprets, what may be missing, an end for kernels that hang.

`tests/conftest.py` calls `prepare` before anything imports Triton, and registers this module for its hooks.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
from collections.abc import Generator, MutableMapping

import pytest
import torch

TURNS = 1 << 22  # looks at a flag before a wait gives up: seconds, where microseconds are usual
LIMIT = 300.0  # seconds of a test without a limit of its own, as in pyproject.toml
GRACE = 30.0  # pytest-timeout, where it is installed, is given time to fail the test and go on
ESSENTIAL = {"torch", "triton", "transformers", "peft", "alora_kernels", "bench", "tests"}

_stderr: list[int] = []  # a copy: tests run with theirs captured


def prepare(environment: MutableMapping[str, str], has_gpu: bool) -> None:
    """Kernels are interpreted where torch finds no GPU; where it finds one, they are compiled with waits that end."""
    if has_gpu:
        environment.setdefault("ALORA_WAIT_TURNS", str(TURNS))
    else:
        environment["TRITON_INTERPRET"] = "1"


def absent_package(error: BaseException | None) -> str | None:
    """The package that an import did not find, unless no GPU run can do without it."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = getattr(error, "cause", None) or error.__cause__  # that of a conftest.py is an attribute
    package = (error.name or "").partition(".")[0] if error is not None else ""
    return package if package and package not in ESSENTIAL else None


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("ALORA_REQUIRE_GPU") and not torch.cuda.is_available():
        raise pytest.UsageError("ALORA_REQUIRE_GPU is set, and torch finds no CUDA or ROCm device on this machine")
    assert sys.__stderr__ is not None
    _stderr.append(os.dup(sys.__stderr__.fileno()))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """`pytest -m gpu` passes over files that need what is not installed; elsewhere that is an error."""
    report = yield
    call = report.__dict__.get("call")
    wanted = re.search(r"(?<!not )\bgpu\b", collector.config.option.markexpr)
    if wanted and report.failed and call is not None:
        package = absent_package(call.excinfo.value)
        if package is not None:
            del report.call  # type: ignore[attr-defined]
            report.outcome, report.result = "skipped", []
            report.longrepr = (str(collector.path), 0, f"Skipped: {package} is not installed")
    return report


def seconds_of(item: pytest.Item) -> float:
    """How long a test may take: its own limit, that of the command line, or the usual one; 0 is no limit."""
    mark = item.get_closest_marker("timeout")
    if mark is not None:
        return float(mark.args[0] if mark.args else mark.kwargs["timeout"])
    chosen = item.config.getoption("timeout", None)
    return LIMIT if chosen is None else float(chosen)


def _watch(item: pytest.Item) -> None:
    """End the process when a phase of a test hangs: no signal and no thread of Python reaches a kernel that spins."""
    faulthandler.cancel_dump_traceback_later()
    seconds = seconds_of(item)
    if seconds > 0 and torch.cuda.is_available():
        grace = GRACE if item.config.pluginmanager.hasplugin("timeout") else 0.0
        faulthandler.dump_traceback_later(seconds + grace, exit=True, file=_stderr[-1])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _watch(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _watch(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    _watch(item)


def pytest_runtest_logfinish() -> None:
    faulthandler.cancel_dump_traceback_later()
