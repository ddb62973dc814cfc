"""`pytest bench --benchmark-only` works although the project's options switch benchmarks off.

`addopts` has `--benchmark-disable`, so that a plain `pytest` never times anything; the plugin refuses it next to
`--benchmark-only`. Whoever asks for benchmarks alone means it: the switch is taken back before the plugin reads it.
"""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let `--benchmark-only` win over `--benchmark-disable`."""
    if config.getoption("benchmark_only", False):
        config.option.benchmark_disable = False
