"""The judge: an implementation's error must stay within twice torch's own, against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alora_kernels import alora_delta, reference
from alora_kernels.ops.dispatch import interpreting

Layer = Callable[..., Tensor]


@dataclass
class Problem:
    """One layer's tensors: leaves get gradients, the rest is given."""

    leaves: dict[str, Tensor]
    weight: Tensor
    given: dict[str, object] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype."""
        leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in self.leaves.items()}
        return Problem(leaves, self.weight.to(dtype), self.given)

    def step(self, layer: Layer, **options: object) -> dict[str, Tensor]:
        """Output and every gradient, by name, for a fixed dy."""
        leaves = dict(self.leaves)
        x, a, b = leaves.pop("x"), leaves.pop("a"), leaves.pop("b")
        y = layer(x, self.weight, a, b, **leaves, **self.given, **options)
        generator = torch.Generator().manual_seed(1)
        # multiples of 1/64 up to 4: the same numbers in every dtype
        dy = (torch.randn(y.shape, generator=generator) * 64).round().clamp(-256, 256).div(64).to(y)
        grads = torch.autograd.grad(y, list(self.leaves.values()), dy)
        return {"y": y.detach(), **{f"d{k}": g for k, g in zip(self.leaves, grads, strict=True)}}


def problem(
    leading: Sequence[int],
    k: int,
    n: int,
    r: int,
    e: int,
    *,
    routing: str,
    dtype: torch.dtype,
    device: str = "cpu",
    ids: Tensor | None = None,
    bias: bool = True,
    scaling: float = 0.75,
) -> Problem:
    """Random tensors of sensible size; ids are random, base-only rows included, unless given."""

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device=device, dtype=dtype)

    leaves = {"x": rand(*leading, k), "a": rand(e, r, k) / k**0.5, "b": rand(n, r) / r**0.5}
    given: dict[str, object] = {"scaling": scaling}
    if bias:
        leaves["bias"] = rand(n)
    if routing == "soft":
        leaves["router"] = rand(e, k) / k**0.5
    else:
        given["task_ids"] = (torch.randint(-1, e, tuple(leading)) if ids is None else ids).to(device)
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    return Problem(leaves, rand(n, k) / k**0.5, given)


def over_a_base(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, *, bias: Tensor | None = None, **options: Any
) -> Tensor:
    """`alora_delta` as a layer; a clone is no view: the base may be overwritten."""
    return alora_delta(x, a, b, base=nn.functional.linear(x, weight, bias).clone(), **options)


def assert_as_good_as_torch(
    p: Problem, layer: Layer, dtype: torch.dtype, *, atol: float = 1e-6, **options: object
) -> None:
    """err(layer) <= 2 x err(reference in the same dtype) + tiny atol, against float64, for y and every gradient."""
    truth = p.to(torch.float64).step(reference.alora_linear)
    torchs = p.step(reference.alora_linear)
    ours = p.step(layer, **options)
    # in 16 bits: one rounding of the largest entry, because torch's own error is sometimes zero by luck
    tiny = atol if dtype == torch.float32 else {torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
    assert_within_twice(ours, torchs, truth, tiny)


def assert_within_twice(
    ours: dict[str, Tensor], torchs: dict[str, Tensor], truth: dict[str, Tensor], tiny: float
) -> None:
    """Every tensor is in torch's dtype, and its error at most twice torch's; relative to entries larger than one."""
    assert ours.keys() == truth.keys()
    for name, t in truth.items():
        assert (ours[name].dtype, ours[name].shape) == (torchs[name].dtype, t.shape), name
        if t.numel() == 0:
            continue
        size = max(1.0, float(t.abs().max()))
        err, own = (float((found[name].double() - t).abs().max()) / size for found in (ours, torchs))
        assert err <= 2 * own + tiny, f"{name}: error {err:.2e}, torch's own {own:.2e}"


def module_step(layer: nn.Module, forward: Layer, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of a module, by name, for a fixed dy."""
    x = x.detach().requires_grad_()
    leaves = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    y = forward(layer, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def assert_module_as_good(layer: nn.Module, formula: Layer, x: Tensor, dtype: torch.dtype) -> None:
    """The same of a module with trained adapters in `dtype`, against its definition `formula(layer, x)`."""
    narrow = copy.deepcopy(layer).to(dtype)
    exact, x = copy.deepcopy(narrow).double(), x.to(dtype)
    truth = module_step(exact, formula, x.double())
    ours = module_step(narrow, lambda module, x: module(x), x)
    assert all(t.dtype == dtype for t in ours.values())
    tiny = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
    assert_within_twice(ours, module_step(narrow, formula, x), truth, tiny)


def skip_unless_runnable(backend: str, device: str, dtype: torch.dtype) -> None:
    """Skip, with the reason, what this machine cannot run."""
    if backend == "triton" and device == "cpu":
        if not interpreting():
            pytest.skip("Triton's interpreter is off on a machine with a GPU")
        if dtype == torch.bfloat16:
            pytest.skip("bf16 dot: not modelled by the interpreter")
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("float64 kernels are for the interpreter's gradcheck")
