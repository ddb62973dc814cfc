"""Which code computes the layer: Triton kernels or torch.

In:   the caller's wish (`backend=`), the environment variable `ALORA_BACKEND`, and the device of x.
Out:  the name of a backend that can run there, or an error that says what to change.
Who:  the ops ask once per call; `alora doctor` prints `explain`.

A wish may name a plan, "triton:one_pass" (see `plans`): for tests and measurements. Without one the tables decide.

The rule: the caller's wish first, then `ALORA_BACKEND`, then Triton on CUDA and ROCm devices and torch
elsewhere. Triton runs on a CPU only in its interpreter, which is exact but slow: for tests, not for work.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from .plans import PLANS

BACKENDS = ("triton", "torch")
ENV = "ALORA_BACKEND"


class BackendError(RuntimeError):
    """A backend was asked for where it cannot run; the message names the remedy."""


_TRITON_FOUND = importlib.util.find_spec("triton") is not None


def triton_installed() -> bool:
    """Whether the triton package can be imported (Linux only)."""
    return _TRITON_FOUND


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


class Choice(NamedTuple):
    """A backend and the reason for it, in words."""

    name: str
    reason: str


def explain(device: torch.device, backend: str | None = None) -> Choice:
    """The backend for tensors on this device, and why.

    Args:
        device: where x lives.
        backend: "triton", "triton:<plan>", "torch", or None for the environment's or the automatic choice.

    Raises:
        ValueError: the name is not a backend.
        BackendError: Triton was asked for where it cannot run.
    """
    wish, source = (backend, "asked for by the caller") if backend else (os.environ.get(ENV) or None, f"{ENV} is set")
    if wish is None:
        if device.type != "cuda":
            return Choice("torch", f"tensors on {device.type}: Triton serves CUDA and ROCm devices")
        if not triton_installed():
            return Choice("torch", "triton is not installed: pip install triton (Linux)")
        return Choice("triton", "tensors on a CUDA or ROCm device")
    name, _, plan = wish.partition(":")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {wish!r} ({source}): choose one of {', '.join(BACKENDS)}")
    if wish != name and (name != "triton" or plan not in PLANS):
        known = ", ".join(f"triton:{plan}" for plan in PLANS)
        raise ValueError(f"unknown plan in backend {wish!r} ({source}): choose one of {known}")
    if name == "triton" and not triton_installed():
        raise BackendError(f"backend 'triton' ({source}) needs the triton package (Linux): pip install triton")
    if name == "triton" and device.type != "cuda" and not (interpreting() and device.type in ("cpu", "meta")):
        raise BackendError(
            f"backend 'triton' ({source}) cannot run on {device.type} tensors: move them to a GPU, use backend='torch',"
            " or set TRITON_INTERPRET=1 before the first import to interpret the kernels (slow)"
        )
    return Choice(wish, source)


def choose(x: torch.Tensor, backend: str | None) -> str:
    """The backend for x; see `explain`.

    Raises:
        TypeError: bf16 in Triton's interpreter, which multiplies bit patterns instead of numbers.
    """
    name = explain(x.device, backend).name
    if name.startswith("triton") and x.dtype == torch.bfloat16 and not x.is_cuda:
        raise TypeError("Triton's interpreter does not model bfloat16: use float16, float32 or float64, or a GPU")
    return name
