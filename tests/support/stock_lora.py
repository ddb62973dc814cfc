"""Stock PEFT LoRA models, a fused copy of one, and how the two are compared."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import alora_kernels
from alora_kernels.tuner import accelerate as module

MLP = {"target_modules": ["up", "down"]}


def stock_lora(base: nn.Module, autocast_adapter_dtype: bool = True, **settings: Any) -> PeftModel:
    """Stock PEFT LoRA whose B is not zero."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | settings
    torch.manual_seed(2)
    return get_peft_model(base, LoraConfig(**given), autocast_adapter_dtype=autocast_adapter_dtype).eval()


def fused_copy(model: nn.Module) -> nn.Module:
    """An accelerated copy; every layer must have changed."""
    copy = deepcopy(model)
    report = alora_kernels.accelerate(copy)
    assert report.layers and not report.skipped
    return copy


def dy_for(y: torch.Tensor) -> torch.Tensor:
    """Random numbers that every dtype holds exactly."""
    return torch.randint(-8, 9, y.shape, generator=torch.Generator().manual_seed(1)).to(y) / 4


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and every gradient, by name, for a fixed dy."""
    x = x.detach().requires_grad_()
    y = model(inputs_embeds=x).logits if hasattr(model.get_base_model(), "lm_head") else model(x)
    dy = dy_for(y)
    leaves = {"x": x} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def no_worse(ours: dict, stock: dict, exact: dict, dtype: torch.dtype) -> None:
    """As in tests/compare.py: an error of at most twice PEFT's own, against float64."""
    tiny = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, torch.finfo(dtype).eps)
    assert ours.keys() == stock.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == stock[name].dtype, name
        size = max(1.0, float(truth.abs().max()))
        own, err = (float((t[name].double() - truth).abs().max()) / size for t in (stock, ours))
        assert err <= 2 * own + tiny, f"{name}: error {err:.2e}, PEFT's own {own:.2e}"


def spy_on_the_op(monkeypatch: Any) -> list[int]:
    """A list that gets one entry for each accelerated layer that runs the fused op."""
    seen: list[int] = []
    real = module.alora_linear

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "alora_linear", spy)
    return seen
