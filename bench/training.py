"""A training step of a small language model over a mixed batch: one fused pass against stock PEFT task by task.

In:   SmolLM2-135M where the demo has left it in the cache, else a Llama of its shape with random weights (the row's
      note says which); rows of random tokens over four tasks.
Out:  candidates for the runner: forward and backward of the whole batch, gradients accumulated in `.grad`.
Who:  `bench.cpu`, section "training". The demo's last table measures the same on a trained adapter.

As in the demo only an answer of four tokens at the end of each row is supervised, and the head computes no other
logits. Stock PEFT refuses `adapter_names` in training, so it runs the tasks one after the other. Both models hold the
same numbers; the truth is stock PEFT in float64: the loss and the gradient of every A and B, worst of all tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import alora_kernels
from alora_kernels.data.cache import cache_dir

from .layers import BOTH
from .problem import Check
from .rows import Row
from .work import Ready

FUSED, STOCK = "fused", "PEFT LoRA task by task"
MODELS = (FUSED, STOCK)
TASKS, ROWS, TOKENS, ANSWER, RANK, ALPHA = 4, 12, 32, 4, 8, 16
TINY = 1e-6


def in_cache() -> bool:
    """Whether the demo has converted SmolLM2-135M on this machine; half a minute's work that is not done here."""
    return any(cache_dir().glob("smollm2-135m-*"))


def base_model() -> Any:
    """The frozen model."""
    if in_cache():
        from alora_kernels.data import load_model

        return load_model("smollm2-135m")[0]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class TrainingWork:
    """The mixed training step and its candidates."""

    directions: Sequence[str] = (BOTH,)
    repeats: float = 1 / 15  # 4 rounds by default: a step takes seconds, not milliseconds

    def __init__(self, names: Sequence[str] = MODELS, base: Callable[[], Any] = base_model) -> None:
        self.names = names
        self._models = _Models(base)
        weights = "" if in_cache() else " with random weights: `make demo` puts the real ones into the cache"
        note = f"all layers of SmolLM2-135M{weights}; k and n are its hidden size"
        size = 576
        self.row = Row(
            case="training step",
            routing="task",
            m=ROWS * TOKENS,
            k=size,
            n=size,
            r=RANK,
            e=TASKS,
            dtype="float32",
            note=note,
        )

    def candidates(self) -> Sequence[TrainingCandidate]:
        """Nothing is built before a candidate is prepared."""
        return [TrainingCandidate(name, self._models) for name in self.names]


class TrainingCandidate:
    """One of the two models."""

    computes = "task"

    def __init__(self, name: str, models: _Models) -> None:
        self.name, self._models = name, models

    def reason(self, direction: str, mode: str) -> str | None:
        """It always runs."""
        return None

    def prepare(self, direction: str, mode: str) -> Ready:
        """One step, its loss and gradients judged."""
        step = partial(self._models.step, self.name)
        loss = step()
        return Ready(step, self._models.check(self._models.results(self.name, loss)))


class _Models:
    """Both models over the same numbers, the batch, and the truth."""

    def __init__(self, base: Callable[[], Any]) -> None:
        self._base = base
        self.ids = torch.arange(ROWS) % TASKS

    @cached_property
    def tokens(self) -> Tensor:
        vocabulary = self.fused.config.vocab_size
        return torch.randint(0, vocabulary, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))

    @cached_property
    def fused(self) -> Any:
        from peft import get_peft_model

        torch.manual_seed(0)
        config = alora_kernels.ALoRAConfig(
            r=RANK, lora_alpha=ALPHA, tasks=TASKS, target_modules="all-linear", init_weights=False
        )
        model: Any = get_peft_model(self._base(), config).train()
        with torch.no_grad():
            for layer in (m for m in model.modules() if hasattr(m, "asymlora_B")):
                layer.asymlora_B["default"].mul_(0.1)  # a correction of the base, as after training
        return model

    @cached_property
    def stock(self) -> Any:
        """Stock PEFT with one LoRA per task: the task's A and a copy of the shared B."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        model: Any = get_peft_model(self._base(), config, adapter_name="0")
        for task in range(1, TASKS):
            model.add_adapter(str(task), config)
        with torch.no_grad():
            for name, layer in self._layers():
                lora = model.get_submodule(name)
                for task in range(TASKS):
                    lora.lora_A[str(task)].weight.copy_(layer.asymlora_A["default"][task])
                    lora.lora_B[str(task)].weight.copy_(layer.asymlora_B["default"])
        return model.train()

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Stock PEFT in float64."""
        model = copy.deepcopy(self.stock).double()
        loss = _task_by_task(model, self.tokens, self.ids)
        return self._of_stock(model, loss)

    @cached_property
    def allowed(self) -> float:
        """Twice the error of stock PEFT in float32, and a tiny bit."""
        loss = _task_by_task(self.stock, self.tokens, self.ids)
        return 2 * self._worst(self._of_stock(self.stock, loss))[0] + TINY

    def step(self, name: str) -> Tensor:
        """Forward and backward of the batch; the loss."""
        if name == STOCK:
            return _task_by_task(self.stock, self.tokens, self.ids)
        self.fused.zero_grad()
        loss = _loss(self.fused, self.tokens, adapter_names=[str(task) for task in self.ids.tolist()])
        loss.backward()
        return loss.detach()

    def results(self, name: str, loss: Tensor) -> dict[str, Tensor]:
        """The loss and all gradients after a step."""
        if name == STOCK:
            return self._of_stock(self.stock, loss)
        found = {"loss": loss}
        for path, layer in self._layers():
            found[f"{path} A"] = layer.asymlora_A["default"].grad
            found[f"{path} B"] = layer.asymlora_B["default"].grad
        return found

    def check(self, got: dict[str, Tensor]) -> Check:
        """The rule of `bench.problem`, over the worst of all tensors: of 420 some differ by luck."""
        worst, where = self._worst(got)
        return Check(worst, self.allowed, where)

    def _worst(self, got: dict[str, Tensor]) -> tuple[float, str]:
        """Largest error relative to the largest entry of its tensor, and the tensor's name."""
        errors = {name: float((got[name].double() - t).abs().max() / t.abs().max()) for name, t in self.truth.items()}
        where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
        return errors[where], where

    def _of_stock(self, model: Any, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of stock PEFT in the shape of ALoRA's: all A in one tensor, those of B summed over tasks."""
        found = {"loss": loss}
        for path, _ in self._layers():
            lora = model.get_submodule(path)
            found[f"{path} A"] = torch.stack([lora.lora_A[str(t)].weight.grad for t in range(TASKS)])
            found[f"{path} B"] = torch.stack([lora.lora_B[str(t)].weight.grad for t in range(TASKS)]).sum(0)
        return found

    def _layers(self) -> list[tuple[str, Any]]:
        """Adapted layers by their path, which is the same in both models."""
        return [(path, m) for path, m in self.fused.named_modules() if hasattr(m, "asymlora_A")]


def _loss(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Loss of the answers' tokens, summed, so that parts of a batch add up."""
    answers = torch.arange(TOKENS - ANSWER - 1, TOKENS - 1)
    logits = model(input_ids=tokens, logits_to_keep=answers, **options).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, answers + 1].flatten(), reduction="sum")


def _task_by_task(model: Any, tokens: Tensor, ids: Tensor) -> Tensor:
    """What stock PEFT can do with a mixed batch: one adapter after the other, each on its rows."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for task in range(TASKS):
        model.set_adapter(str(task))
        loss = _loss(model, tokens[ids == task])
        loss.backward()
        total += loss.detach()
    return total
