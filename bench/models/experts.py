"""A training step of a mixture whose experts are adapted: one mixed pass against stock PEFT's `target_parameters`.

Stock PEFT builds W + s B A of every expert in every forward pass and refuses mixed batches. What is least is attention
adapted alone, by either. A of ours is shared by the experts of a layer, so the gradient of stock's copies adds up to
its gradient. The column of peak memory holds what autograd keeps from forward to backward, parameters aside.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import alora_kernels
from alora_kernels import route
from alora_kernels.adapters.export import as_parameter
from alora_kernels.tuner.experts import StackedWeight

from ..report.rows import BOTH, Row
from ..report.targets import ATTENTION
from ..run import Candidate, Check, Ready, Work
from .pair import FUSED, ONE, Setting, Step, judged
from .training import STOCK, Training

OURS_ATTENTION = "fused, attention alone"
MODELS = (FUSED, STOCK, ONE, ATTENTION, OURS_ATTENTION)
LESS = {ONE: "lora", ATTENTION: "lora", OURS_ATTENTION: "task"}  # of other gradients -> what it computes
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
STEP = Setting("experts", tasks=8, rows=8, tokens=64, answer=63)
SIZES = {"width": 256, "experts": 32, "layers": 4, "top": 8, "inside": 256}


def mixture(dtype: torch.dtype, *, width: int, experts: int, layers: int, top: int, inside: int) -> Any:
    """A Qwen3-MoE with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": width // 8}
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=1024, hidden_size=width, moe_intermediate_size=inside, num_hidden_layers=layers,
        num_experts=experts, num_experts_per_tok=top, norm_topk_prob=True, **heads,
    ))  # fmt: skip
    return model.to(dtype)


class Experts(Training):
    @cached_property
    def fused(self) -> Any:
        return self._ours("all-experts")

    def _ours(self, parameters: str | None) -> Any:
        from peft import get_peft_model

        torch.manual_seed(0)
        s = self.setting
        config = alora_kernels.ALoRAConfig(
            r=s.r, lora_alpha=s.alpha, tasks=s.tasks, init_weights=False, target_modules=LINEAR,
            target_parameters=parameters,
        )  # fmt: skip
        model: Any = get_peft_model(self._base(), config, autocast_adapter_dtype=self.widens)
        with torch.no_grad():
            for layer in (m for m in model.modules() if hasattr(m, "asymlora_spec") and m.asymlora_spec):
                layer.asymlora_B["default"].weight.mul_(0.1)
        return model.train()

    @cached_property
    def stock(self) -> Any:
        from peft import LoraConfig, get_peft_model

        s, stacks = self.setting, [name.removeprefix("base_model.model.") for name, _ in self._stacks]
        config = LoraConfig(r=s.r, lora_alpha=s.alpha, target_modules=LINEAR, target_parameters=stacks)
        model: Any = get_peft_model(self._base(), config, adapter_name="0", autocast_adapter_dtype=self.widens)
        for task in range(1, s.tasks):
            model.add_adapter(str(task), config, autocast_adapter_dtype=self.widens)
        with torch.no_grad():
            for name, layer in self.layers():
                lora = _lora(model, name)
                for task in range(s.tasks):
                    a, b = layer.asymlora_A["default"].weight[task], layer.asymlora_B["default"].weight
                    if isinstance(layer, StackedWeight):
                        a, b = as_parameter(*layer.factors("default", task), layer.num_experts)
                    lora.lora_A[str(task)].weight.copy_(a)
                    lora.lora_B[str(task)].weight.copy_(b)
        return model.train()

    @cached_property
    def attention(self) -> dict[str, Any]:
        """The models whose attention alone is adapted."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=self.setting.r, lora_alpha=self.setting.alpha, target_modules=LINEAR)
        stock: Any = get_peft_model(self._base(), config, autocast_adapter_dtype=self.widens)
        return {ATTENTION: stock.train(), OURS_ATTENTION: self._ours(None)}

    def double(self) -> Any:
        model = copy.deepcopy(self.stock).double()
        model.config._experts_implementation = "eager"  # the others know no float64
        return model

    @cached_property
    def _stacks(self) -> list[tuple[str, Any]]:
        return [(path, layer) for path, layer in self.layers() if isinstance(layer, StackedWeight)]

    def layers(self) -> list[tuple[str, Any]]:
        return [(path, m) for path, m in self.fused.named_modules() if getattr(m, "asymlora_spec", None)]

    def step(self, name: str) -> tuple[Tensor]:
        if name not in self.attention:
            return super().step(name)
        model = self.attention[name]
        model.zero_grad()
        with route(self.ids):
            loss = self._loss(model, self.tokens)
        loss.backward()
        return (loss.detach(),)

    def _of_stock(self, model: Any, loss: Tensor) -> dict[str, Tensor]:
        found, tasks = {"loss": loss}, range(self.setting.tasks)
        for path, layer in self.layers():
            lora = _lora(model, path)
            a = torch.stack([lora.lora_A[str(t)].weight.grad for t in tasks])
            b = torch.stack([lora.lora_B[str(t)].weight.grad for t in tasks]).sum(0)
            if isinstance(layer, StackedWeight):
                a = a.unflatten(1, (layer.num_experts, -1)).sum(1)
                b = b.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
            found[f"{path} A"], found[f"{path} B"] = a, b
        return found

    def kept_mb(self, name: str) -> float:
        """What autograd keeps from forward to backward of a step, each storage once, parameters aside."""
        models = [*self.attention.values(), self.fused, self.stock]
        own = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
        sizes: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            storage, recomputing = t.untyped_storage(), torch._C._current_graph_task_id() != -1
            if storage.data_ptr() not in own and not recomputing:
                sizes[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            self.step(name)
        return sum(sizes.values()) / 1e6


def _lora(model: Any, path: str) -> Any:
    """Stock PEFT's layer for one of ours: around a module with two parameters it nests its wrappers."""
    module, _, leaf = path.rpartition(".")
    found = model.get_submodule(module) if leaf in ("gate_up_proj", "down_proj") else model.get_submodule(path)
    while getattr(found, "parameter_name", leaf) != leaf:
        found = found.base_layer
    return found


def experts_work(names: Sequence[str], base: Callable[[], Any], setting: Setting, width: int, note: str) -> Work:
    """The step by each of these models; `width` stands in the columns k and n."""
    models = Experts(base, setting)
    dtype = str(setting.dtype).removeprefix("torch.")
    row = Row(case=setting.case, routing="task", dtype=dtype, note=note, m=models.m, k=width, n=width, r=setting.r,
              e=setting.tasks)  # fmt: skip

    def check(name: str, outputs: Sequence[Tensor]) -> Check:
        if name in LESS:
            return Check(0.0 if bool(outputs[0].isfinite().all()) else float("nan"), 0.0, "output")
        return judged(models.results(name, outputs), models.truth, models.allowed)

    def candidate(name: str) -> Candidate:
        def prepare(direction: str, mode: str) -> Ready:
            step: Step = models.step_of(name)
            kept = models.kept_mb(name)
            return Ready(step, check(name, step()), kept)

        return Candidate(name, LESS.get(name, "task"), lambda direction, mode: models.reason(name, mode), prepare)

    return Work(row, [BOTH], lambda: [candidate(name) for name in names], 1.0)


def default_work(names: Sequence[str], sizes: dict[str, int], dtype: torch.dtype = torch.float32) -> Work:
    """The step that targets are set for, or one of other sizes."""
    note = f"Qwen3-MoE, {sizes['layers']} layers, {sizes['experts']} experts of width {sizes['inside']}, {sizes['top']}"
    base = partial(mixture, dtype, **sizes)
    return experts_work(names, base, STEP, sizes["width"], f"{note} a token; peak MB is what autograd keeps")
