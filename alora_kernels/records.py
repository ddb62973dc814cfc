"""What ops and kernels both speak of, kept where neither needs the other: dropout, and the dtype of sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """Dropout of the low-rank path's input: the mask is a function of the seed alone."""

    p: float  # probability that an entry of x is dropped, 0 .. 1
    seed: Tensor  # one int64 on x's device, drawn from torch's generator of that device


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products are summed and the softmax is taken: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
