"""Tiny models adapted by each method, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alora_kernels import route
from alora_kernels.adapters.method import Method
from alora_kernels.baselines.methods import adapt, trained
from alora_kernels.modules.adapter import AdaptedLinear
from tests.support.tiny import llama, logits, tokens

TASKS = ("math", "code", "law")
PLAIN = ("lora-per-task", "hydralora")


def method(name: str, **changes: Any) -> Method:
    return Method(name, **{"tasks": TASKS, "r": 4, "num_experts": 2, **changes})


def adapted(name: str, base: Any = None, *, zero_b: bool = False, **changes: Any) -> Any:
    """A model of one method; its B are not zero, so that adapters do something."""
    torch.manual_seed(5)
    model = adapt(llama() if base is None else base, method(name, **changes)).eval()
    if not zero_b:
        with torch.no_grad():
            for key, parameter in trained(model).items():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
    return model


def adapted_layers(model: nn.Module) -> set[str]:
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return {
        name.removeprefix(prefix)
        for name, m in model.named_modules()
        if isinstance(m, AdaptedLinear | BaseTunerLayer) and name != "base_model"
    }


def answers(model: nn.Module, ids: list[int] | None = None) -> torch.Tensor:
    with route(torch.tensor(ids or [0, 1, 2, -1])):
        return logits(model, tokens(4))
