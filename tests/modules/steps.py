"""The judge of tests/compare.py, for layers that are modules: output and every gradient against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def step(layer: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient, by name, for a fixed dy."""
    x = x.detach().requires_grad_()
    leaves = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    y = forward(layer, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def assert_as_good(layer: nn.Module, formula: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> None:
    """err(layer) <= 2 x err(the formula in the same dtype) + tiny, against the formula in float64.

    Args:
        layer: with trained adapters.
        formula: `(layer, x) -> y`, the definition written out.
        x: activations.
        dtype: in which both compute, from the same numbers.
    """
    narrow = copy.deepcopy(layer).to(dtype)
    exact = copy.deepcopy(narrow).double()
    x = x.to(dtype)
    truth = step(exact, formula, x.double())
    torchs, ours = step(narrow, formula, x), step(narrow, lambda module, x: module(x), x)
    tiny = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
    assert ours.keys() == truth.keys()
    for name, t in truth.items():
        assert ours[name].dtype == dtype, name
        size = max(1.0, float(t.abs().max()))
        own, err = (float((v[name].double() - t).abs().max()) / size for v in (torchs, ours))
        assert err <= 2 * own + tiny, f"{name}: error {err:.2e}, torch's own {own:.2e}"
