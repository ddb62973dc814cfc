"""Stock PEFT: one LoRA, a mixed batch of LoRAs, and Poly, each PEFT's own layer around an `nn.Linear`.

PEFT widens adapters over a 16-bit base to float32 by default and is then slower: here they keep the problem's dtype.
Poly's router runs in eval mode, because in training it samples its weights, which no float64 truth can match.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layer import Layer
from .problem import Problem


class _Host(nn.Module):
    """The smallest model with a linear layer that PEFT can adapt."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        with torch.device("meta"):
            self.proj = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.proj.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


def _adapt(problem: Problem, config: Any, names: Sequence[str]) -> Any:
    """PEFT's layer around the frozen weight, with one adapter per name."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that a bare module has no config
        model: Any = get_peft_model(
            _Host(problem.given.weight), config, adapter_name=names[0], autocast_adapter_dtype=False
        )
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    return model.base_model.model.proj


def _lora_config(problem: Problem) -> Any:
    from peft import LoraConfig

    rank = problem.case.r
    return LoraConfig(r=rank, lora_alpha=rank * problem.scaling, target_modules=["proj"])  # type: ignore[arg-type]


def _own(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


def lora(problem: Problem) -> Layer:
    layer = _adapt(problem, _lora_config(problem), ["one"])
    layer.lora_A["one"].weight, layer.lora_B["one"].weight = _own(problem.tensor("a1")), _own(problem.tensor("b"))
    x = problem.tensor("x")
    leaves = [x, layer.lora_A["one"].weight, layer.lora_B["one"].weight]
    return Layer(lambda: layer(x), leaves, lambda grads: dict(zip(("x", "a1", "b"), grads, strict=True)))


def mixed_batch(problem: Problem) -> Layer:
    """One LoRA per task, chosen row by row with `adapter_names`; PEFT refuses that in training."""
    names = [str(task) for task in range(problem.case.e)]
    layer = _adapt(problem, _lora_config(problem), names)
    for task, name in enumerate(names):
        layer.lora_A[name].weight = _own(problem.tensor("a")[task])
        layer.lora_B[name].weight = _own(problem.tensor("bs")[task])
    layer.eval()
    x, chosen = problem.tensor("x"), [names[task] for task in problem.ids.tolist()]
    return Layer(lambda: layer(x, adapter_names=chosen), [], lambda grads: {})


def poly(problem: Problem) -> Layer:
    """Poly with as many skills as tasks and no splits."""
    from peft import PolyConfig

    c = problem.case
    config = PolyConfig(r=c.r, n_tasks=c.e, n_skills=c.e, n_splits=1, target_modules=["proj"])
    layer = _adapt(problem, config, ["one"])
    layer.poly_lora_A["one"] = _own(problem.tensor("a").mT.unsqueeze(0))
    layer.poly_lora_B["one"] = _own(problem.tensor("bs").mT.unsqueeze(0))
    layer.poly_router["one"].module_logits = _own(problem.tensor("logits"))
    layer.eval()
    x = problem.tensor("x")
    leaves = [x, layer.poly_lora_A["one"], layer.poly_lora_B["one"], layer.poly_router["one"].module_logits]
    for leaf in leaves:
        leaf.requires_grad_()

    def rename(grads: Sequence[Tensor]) -> dict[str, Tensor]:
        dx, da, dbs, dlogits = grads
        return {"x": dx, "a": da[0].mT, "bs": dbs[0].mT, "logits": dlogits}

    return Layer(lambda: layer(x, task_ids=problem.ids), leaves, rename)
