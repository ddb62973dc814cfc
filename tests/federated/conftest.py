"""What all tests of the federated part share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> Iterator[None]:
    """Several of Flower's strategies collect garbage for every reply: a third of a second where torch is imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
