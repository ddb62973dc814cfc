"""Shared by all tests: one thread per worker, Triton's interpreter where there is no GPU, devices to test on."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # pytest -n 2 on two cores: workers must not fight
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support import gpu_run

gpu_run.prepare(os.environ, torch.cuda.is_available())
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(gpu_run)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a `device` argument runs on the CPU and, marked `gpu`, on a GPU."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU machine the kernel tests run there and belong to `-m gpu`; elsewhere GPU tests say why they skip."""
    for item in items:
        if torch.cuda.is_available():
            if item.path.parent.name == "kernels":
                item.add_marker(pytest.mark.gpu)
        elif item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device on this machine"))
    items.sort(key=lambda item: item.path.name == "test_races.py")  # last: what hangs there hides nothing else


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
