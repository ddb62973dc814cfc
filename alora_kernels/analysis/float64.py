"""Matrices as float64, checked: the same numbers, or an error that names the argument. For every measurement here.

float64 because these numbers are differences of nearly equal ones: an adapter moves a column of W0 by 1e-3 of its
length, which is 5e-7 in 1 - cos, and float32 resolves 6e-8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def checked(name: str, matrix: Tensor) -> Tensor:
    """The matrix without its graph. Raises TypeError if it is no floating tensor, ValueError if not 2-D, or empty."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        found = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"{name} must be a tensor of a floating dtype, got {found}")
    if matrix.dim() != 2:
        raise ValueError(f"{name} must be a matrix, got shape {list(matrix.shape)}: pass one task's slice of a stack")
    if matrix.numel() == 0:
        raise ValueError(f"{name} is empty, shape {list(matrix.shape)}")
    return matrix.detach()


def double(tensor: Tensor) -> Tensor:
    """The tensor without its graph in float64, where it is; Apple's GPUs have none, so from there on the CPU."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


def exact(name: str, matrix: Tensor) -> Tensor:
    """The matrix in float64. Raises as `checked`, and ValueError for NaN or infinity."""
    values = double(checked(name, matrix))
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity: the run it comes from diverged")
    return values


def factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One task's A `[R, K]` and B `[N, R]` in float64 on one device. Raises as `exact`, or if their ranks differ."""
    left, right = exact("b", b), exact("a", a)
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"a {list(a.shape)} and b {list(b.shape)} have different ranks: a is [R, K] and b is [N, R], as stored"
        )
    return right, left.to(right.device)


def scale(scaling: float) -> float:
    """s as a float. Raises ValueError for NaN or infinity."""
    value = float(scaling)
    if not math.isfinite(value):
        raise ValueError(f"scaling must be a finite number, got {value}")
    return value
