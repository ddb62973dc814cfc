"""Kernels compute in every dtype that the device at hand can model, and leave their counters zero."""

from collections.abc import Iterator

import pytest
import torch

from alora_kernels.kernels import sync

from .cases import DTYPES, skip_unmodelled


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A dtype of the layer; skips with the reason where it cannot be computed."""
    skip_unmodelled(request.param)
    return request.param


@pytest.fixture(autouse=True)
def _counters_end_at_zero() -> Iterator[None]:
    """A launch that does not clean up, or a wait that gave up, fails the test it belongs to and not the next one."""
    yield
    raised = [block for block in sync._blocks.values() if block.any()]
    for block in raised:
        block.zero_()
    assert not raised, "a launch left counters raised: a wait gave up, or the last program did not clean up"
