"""Without `--benchmark-only` the entries run once and only verify."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("benchmark_only", False):
        config.option.benchmark_disable = True
