"""Groups of layers that read the same x, for the tests of `alora_linear_group`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alora_kernels import alora_linear_group, reference


@dataclass
class Group:
    """The tensors of a group; leaves get gradients."""

    x: torch.Tensor
    weights: list[torch.Tensor]
    leaves: dict[str, torch.Tensor]
    ids: torch.Tensor | None
    scalings: list[float]

    def to(self, dtype: torch.dtype) -> Group:
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in self.leaves.items()}
        x = self.x.detach().to(dtype).requires_grad_()
        return Group(x, [w.to(dtype) for w in self.weights], leaves, self.ids, self.scalings)

    def given(self, i: int) -> dict[str, Any]:
        """What `alora_linear` takes for one member."""
        return {
            "bias": self.leaves.get(f"bias{i}"), "router": self.leaves.get(f"router{i}"),
            "task_ids": self.ids, "scaling": self.scalings[i],
        }  # fmt: skip

    def call(self, **options: Any) -> tuple[torch.Tensor, ...]:
        """The op."""
        n = len(self.weights)
        parts = {key: [self.leaves.get(f"{key}{i}") for i in range(n)] for key in ("a", "b", "bias", "router")}
        routers = None if self.ids is not None else parts["router"]
        return alora_linear_group(
            self.x, self.weights, parts["a"], parts["b"], biases=parts["bias"], routers=routers, task_ids=self.ids,
            scalings=self.scalings, **options,
        )  # fmt: skip

    def separate(self, layer: Callable[..., torch.Tensor], **options: Any) -> tuple[torch.Tensor, ...]:
        """One call of the layer per member."""
        members = zip(self.weights, range(len(self.weights)), strict=True)
        return tuple(
            layer(self.x, w, self.leaves[f"a{i}"], self.leaves[f"b{i}"], **self.given(i), **options) for w, i in members
        )

    def step(self, ys: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """Outputs and every gradient, by name, for fixed dy."""
        generator = torch.Generator().manual_seed(1)
        dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in ys]
        grads = torch.autograd.grad(ys, [self.x, *self.leaves.values()], dys)
        outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return {**outputs, **{f"d{name}": g for name, g in zip(["x", *self.leaves], grads, strict=True)}}


def group(
    leading: Sequence[int],
    k: int,
    ns: Sequence[int],
    rs: Sequence[int],
    es: Sequence[int],
    *,
    routing: str = "task",
    dtype: torch.dtype = torch.float32,
    ids: torch.Tensor | None = None,
    biases: Sequence[bool] = (True, False, True),
    device: str = "cpu",
) -> Group:
    """Random members of sensible size; some have a bias and their scalings differ."""

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device=device, dtype=dtype)

    leaves = {}
    for i, (n, r, e) in enumerate(zip(ns, rs, es, strict=True)):
        leaves |= {f"a{i}": rand(e, r, k) / k**0.5, f"b{i}": rand(n, r) / r**0.5}
        if biases[i % 3]:
            leaves[f"bias{i}"] = rand(n)
        if routing == "soft":
            leaves[f"router{i}"] = rand(e, k) / k**0.5
    if routing == "task" and ids is None:
        ids = torch.randint(-1, es[0], tuple(leading))
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    weights = [rand(n, k) / k**0.5 for n in ns]
    ids = ids.to(device) if ids is not None and routing == "task" else None
    return Group(rand(*leading, k).requires_grad_(), weights, leaves, ids, [0.5, 1.0, 0.75][: len(ns)])


def assert_as_good_as_torch(g: Group, dtype: torch.dtype, **options: Any) -> None:
    """The judge of `tests.compare`, for a group."""
    wide = g.to(torch.float64)
    truth = wide.step(wide.separate(reference.alora_linear))
    torchs, ours = g.step(g.separate(reference.alora_linear)), g.step(g.call(**options))
    tiny = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    for name, t in truth.items():
        assert ours[name].dtype == torchs[name].dtype and ours[name].shape == t.shape, name
        if t.numel() == 0:
            continue
        size = max(1.0, float(t.abs().max()))
        own, err = (float((found[name].double() - t).abs().max()) / size for found in (torchs, ours))
        assert err <= 2 * own + tiny, f"{name}: error {err:.2e}, torch's own {own:.2e}"
