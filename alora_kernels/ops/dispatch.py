"""Which code computes the layer, and in which of several ways: the backend and its plan.

The caller's wish (`backend=`) comes first, then `ALORA_BACKEND`, then Triton on CUDA and ROCm devices and torch
elsewhere; Triton runs on a CPU only in its interpreter, for tests. Without a plan in the wish ("triton:one_pass") a
measurement on the chip (`kernels/tuned.py`) decides, else the vendor's GEMM computes the base: that can only lose the
low-rank part's own time, where our own GEMM must first come within a few per cent of it to pay. The one-pass kernels
are taken only where `alora tune` has proven them: programs that wait for each other deserve a proof on the chip itself.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

ENV = "ALORA_BACKEND"


class BackendError(RuntimeError):
    """A backend was asked for where it cannot run; the message names the remedy."""


class Plan(NamedTuple):
    """How Triton computes one layer; `kernels/README.md` has a table of them."""

    forward: str  # "one_pass", "two_launch", "two_launch+pdl", "base_first" or "low_rank_first"
    dx: str  # "fused": one launch; "low_rank_first": the low-rank part, then the vendor's GEMM adds dy w to it
    overlap: bool = False  # small kernels (shrink before base_first, da beside dx) run on a side stream


class Backend(NamedTuple):
    """Who computes the layer, "triton" or "torch", and the plan it was told to take."""

    name: str
    plan: Plan | None = None


_FUSED, _VENDORS = ("one_pass", "two_launch", "two_launch+pdl"), ("base_first", "low_rank_first")
_DX = {**dict.fromkeys(_FUSED, "fused"), **dict.fromkeys(_VENDORS, "low_rank_first")}
PLANS = {
    **{forward: Plan(forward, dx) for forward, dx in _DX.items()},
    **{f"{forward}+overlap": Plan(forward, dx, True) for forward, dx in _DX.items()},
}
BACKENDS = {
    "triton": Backend("triton"),
    "torch": Backend("torch"),
    **{f"triton:{name}": Backend("triton", plan) for name, plan in PLANS.items()},
}
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # only Linux has it
_refusals: dict[torch.device, str] = {}  # `unserved` of each device seen


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


class Choice(NamedTuple):
    """A key of `BACKENDS` and the reason for it, in words."""

    name: str
    reason: str


def explain(device: torch.device, backend: str | None = None) -> Choice:
    """The backend for tensors on this device, and why; `backend` as in `alora_linear`, also "triton:<plan>".

    Raises:
        ValueError: the name is not a backend.
        BackendError: Triton was asked for where it cannot run.
    """
    wish, source = (backend, "asked for by the caller") if backend else (os.environ.get(ENV) or None, f"{ENV} is set")
    if wish is None:
        if device.type != "cuda":
            return Choice("torch", f"tensors on {device.type}: Triton serves CUDA and ROCm devices")
        if not TRITON_INSTALLED:
            return Choice("torch", "triton is not installed: pip install triton (Linux)")
        if why_not := _why_not(device):
            return Choice("torch", why_not)
        return Choice("triton", "tensors on a CUDA or ROCm device")
    if wish not in BACKENDS:
        if wish.partition(":")[0] not in BACKENDS:
            raise ValueError(f"unknown backend {wish!r} ({source}): choose one of triton, torch")
        known = ", ".join(name for name, known in BACKENDS.items() if known.plan)
        raise ValueError(f"unknown plan in backend {wish!r} ({source}): choose one of {known}")
    if BACKENDS[wish].name == "triton":
        _check_triton(device, source)
    return Choice(wish, source)


def _check_triton(device: torch.device, source: str) -> None:
    if not TRITON_INSTALLED:
        raise BackendError(f"backend 'triton' ({source}) needs the triton package (Linux): pip install triton")
    if device.type != "cuda" and not (interpreting() and device.type in ("cpu", "meta")):
        raise BackendError(
            f"backend 'triton' ({source}) cannot run on {device.type} tensors: move them to a GPU, use backend='torch',"
            " or set TRITON_INTERPRET=1 before the first import to interpret the kernels (slow)"
        )
    if device.type == "cuda" and (why_not := _why_not(device)):
        raise BackendError(f"backend 'triton' ({source}) cannot serve this GPU: {why_not}; use backend='torch'")


def _why_not(device: torch.device) -> str:
    if device not in _refusals:  # a dictionary, because the compiler traces through here
        from ..kernels import chip_of  # the kernels package needs triton

        _refusals[device] = unserved(chip_of(device))
    return _refusals[device]


def unserved(chip: str) -> str:
    """Why Triton is no use on a chip that it knows, or "" where it is."""
    if chip.startswith("sm_") and int(chip.removeprefix("sm_")) < 80:
        return f"{chip} is older than sm_80, and Triton multiplies without tensor cores there"
    if chip.startswith("gfx10"):
        return f"Triton compiles no products for {chip}"
    return ""


def prepare(device: torch.device) -> None:
    """Allocate what launches on a GPU share, before a graph is captured whose memory it must not lie in.

    Layers call it when they are made; `choose` when they are called.
    """
    if device.type == "cuda" and TRITON_INSTALLED and not torch.compiler.is_compiling():
        _why_not(device)
        _sync().prepare(device)


@cache
def _sync() -> ModuleType:
    """Where counters are made: an import statement costs a call more than all else that it does there."""
    from ..kernels import sync  # the kernels package needs triton

    return sync


def choose(x: torch.Tensor, backend: str | None) -> str:
    """The key of the backend for x; see `explain`.

    A TypeError for bf16 in Triton's interpreter, which multiplies bit patterns instead of numbers.
    """
    key = explain(x.device, backend).name
    if key != "torch" and x.dtype == torch.bfloat16 and not x.is_cuda:
        raise TypeError("Triton's interpreter does not model bfloat16: use float16, float32 or float64, or a GPU")
    if key != "torch":
        prepare(x.device)
    return key


def explain_plan(chip: str, routing: str, itemsize: int, m: int, k: int, n: int) -> tuple[Plan, str]:
    """The plan for a layer of m rows, k in_features and n out_features, and why.

    chip as `kernels.tiles.chip_of` names it, routing "task" or "soft", itemsize in bytes per element of x.
    """
    from ..kernels import tuned  # the kernels package needs triton
    from ..kernels.tiles import shape_class

    measured = tuned.PLANS.get((chip, routing, itemsize, shape_class(m, k, n)))
    if measured is not None:
        return Plan(*measured), f"measured: {tuned.MEASURED}"
    if chip == "interpreter":
        return PLANS["two_launch"], "the interpreter is there to test our kernels"
    return PLANS["base_first"], f"no measurement on {chip}: the vendor's GEMM is the safe choice"
