"""Kernels compute in every dtype that the device at hand can model."""

import pytest
import torch

from .cases import DTYPES, skip_unmodelled


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A dtype of the layer; skips with the reason where it cannot be computed."""
    skip_unmodelled(request.param)
    return request.param
