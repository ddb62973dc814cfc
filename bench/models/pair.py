"""A language model twice over the same numbers, with our tuner and with stock PEFT, one LoRA per task.

Without `widens` both adapters have the dtype of the base, stock PEFT's faster way in 16 bits. Right is stock PEFT in
float64; what is allowed is twice the error of stock PEFT in the same dtype, over the worst of all tensors.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import alora_kernels

from ..report.rows import Row
from ..run import Candidate, Check, Ready, Work, made_ready
from .worker import llama

FROZEN, FUSED, ONE = "frozen", "fused", "PEFT LoRA, one for all tasks"
SMALLER = {FROZEN: "frozen", ONE: "lora"}  # what does less than several adapters -> what it computes
TINY = 1e-6
Step = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Setting:
    """A batch and the adapters; row i is of task i modulo tasks, the last `answer` tokens of each are supervised."""

    case: str
    tasks: int
    rows: int
    tokens: int
    answer: int = 4
    r: int = 8
    alpha: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


def eight_billion(layers: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Callable[[], Any]:
    """Llama 3 8B by its shapes, with fewer layers and random weights."""
    widths = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0}
    return partial(llama, device, dtype, num_hidden_layers=layers, **widths, **heads)


class Pair(ABC):
    """The two adapted models and the base as it is, each built when first needed, and a batch.

    What every call would do alike, such as switching modes, is done here once: it would be timed, and would cost stock
    PEFT the most, which has a module per adapter. A subclass says what a step is, and what is right.
    """

    direction: str  # the pass that a step is
    repeats = 1.0  # see `run.Work`
    training = True  # the mode of all models
    widens = False  # whether adapters over 16 bits are float32, as PEFT and our recipes have them by default
    stock_name: str

    def __init__(self, base: Callable[[], Any], setting: Setting) -> None:
        self._base, self.setting = base, setting

    @property
    def m(self) -> int:
        return self.setting.rows * self.setting.tokens

    @abstractmethod
    def reason(self, name: str, mode: str) -> str | None: ...  # why a model takes no part in a mode

    @abstractmethod
    def step_of(self, name: str) -> Step: ...  # ready to be timed; what it computes comes first in what it returns

    @abstractmethod
    def results(self, name: str, outputs: Sequence[Tensor]) -> dict[str, Tensor]: ...  # what is judged, by name

    @property
    @abstractmethod
    def truth(self) -> dict[str, Tensor]: ...  # the same of stock PEFT in float64

    @cached_property
    def allowed(self) -> float:
        return 2 * worst_of(self.results(self.stock_name, self.step_of(self.stock_name)()), self.truth)[0] + TINY

    def check(self, name: str, outputs: Sequence[Tensor]) -> Check:
        """What came of a step against the truth; of stock code that computes less, whether it is numbers at all."""
        if name in SMALLER:
            return Check(0.0 if bool(outputs[0].isfinite().all()) else float("nan"), 0.0, "output")
        return judged(self.results(name, outputs), self.truth, self.allowed)

    @cached_property
    def frozen(self) -> Any:
        return self._base().requires_grad_(False).train(self.training)

    @cached_property
    def fused(self) -> Any:
        """Our tuner, one A per task and a shared B, as after some training."""
        from peft import get_peft_model

        torch.manual_seed(0)
        s = self.setting
        options: Any = {"r": s.r, "lora_alpha": s.alpha, "target_modules": "all-linear"}
        config = alora_kernels.ALoRAConfig(**options, tasks=self.tasks, init_weights=False)
        model: Any = get_peft_model(self._base(), config, autocast_adapter_dtype=self.widens)
        with torch.no_grad():
            for layer in (m for m in model.modules() if hasattr(m, "asymlora_B")):
                layer.asymlora_B["default"].weight.mul_(0.1)  # a correction of the base, as after training
        return model.train(self.training)

    @cached_property
    def stock(self) -> Any:
        """Stock PEFT with one LoRA per task: the task's A and a copy of the shared B."""
        from peft import LoraConfig, get_peft_model

        s = self.setting
        config = LoraConfig(r=s.r, lora_alpha=s.alpha, target_modules="all-linear")
        model: Any = get_peft_model(self._base(), config, adapter_name="0", autocast_adapter_dtype=self.widens)
        for task in range(1, s.tasks):
            model.add_adapter(str(task), config, autocast_adapter_dtype=self.widens)
        with torch.no_grad():
            for name, layer in self.layers():
                lora = model.get_submodule(name)
                for task in range(s.tasks):
                    lora.lora_A[str(task)].weight.copy_(layer.asymlora_A["default"].weight[task])
                    lora.lora_B[str(task)].weight.copy_(layer.asymlora_B["default"].weight)
        return model.train(self.training)

    def double(self) -> Any:
        return copy.deepcopy(self.stock).double()

    @property
    def tasks(self) -> Any:
        """Of our adapter: their number, or their names."""
        return self.setting.tasks

    @cached_property
    def ids(self) -> Tensor:
        return torch.arange(self.setting.rows, device=self.setting.device) % self.setting.tasks

    @cached_property
    def tokens(self) -> Tensor:
        s, vocabulary = self.setting, self.fused.config.vocab_size
        drawn = torch.randint(0, vocabulary, (s.rows, s.tokens), generator=torch.Generator().manual_seed(0))
        return drawn.to(s.device)

    def layers(self) -> list[tuple[str, Any]]:
        return [(path, m) for path, m in self.fused.named_modules() if hasattr(m, "asymlora_A")]


def model_work(names: Sequence[str], models: Pair, *, width: int, note: str) -> Work:
    """A step of whole models; `width`, the hidden size, stands in the columns k and n."""
    s = models.setting
    shape: dict[str, Any] = {"m": models.m, "k": width, "n": width, "r": s.r, "e": s.tasks}
    row = Row(case=s.case, routing="task", dtype=str(s.dtype).removeprefix("torch."), note=note, **shape)

    def candidate(name: str) -> Candidate:
        def prepare(direction: str, mode: str) -> Ready:
            return made_ready(models.step_of(name), s.device, mode, partial(models.check, name))

        return Candidate(name, SMALLER.get(name, "task"), lambda direction, mode: models.reason(name, mode), prepare)

    return Work(row, [models.direction], lambda: [candidate(name) for name in names], models.repeats)


def judged(got: dict[str, Tensor], truth: dict[str, Tensor], allowed: float) -> Check:
    """The rule of `bench.layers.problem`, over the worst of all tensors: of 420 some differ by luck."""
    worst, where = worst_of(got, truth)
    return Check(worst, allowed, where)


def worst_of(got: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[float, str]:
    """Largest error relative to the largest entry of its tensor, and the tensor's name."""
    errors = {name: float((got[name].double() - t).abs().max() / t.abs().max()) for name, t in truth.items()}
    where = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    return errors[where], where
