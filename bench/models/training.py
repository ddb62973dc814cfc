"""A training step of a language model over a mixed batch: one fused pass against stock PEFT task by task.

On CPUs SmolLM2-135M where the demo has left it in the cache, else a Llama of its shape with random weights; on GPUs
some layers of a Llama 3 8B. As in the demo only an answer at the end of each row is supervised. Stock PEFT refuses
`adapter_names` in training; "one for all tasks" gives all rows to one of its LoRAs. Judged are the loss and the
gradient of every A and B.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from alora_kernels import route
from alora_kernels.files import cache_dir

from ..report.rows import BOTH, GRAPH
from .pair import FROZEN, FUSED, ONE, Pair, Setting, Step
from .worker import llama

STOCK = "PEFT LoRA task by task"
PLAIN = f"{STOCK}, labels="  # the loss left to the model, which computes all logits
MODELS = (FUSED, STOCK, ONE)
SMALL = Setting("training step", tasks=4, rows=12, tokens=32)


def in_cache() -> bool:
    """Whether the demo has converted SmolLM2-135M on this machine; half a minute's work that is not done here."""
    return any(cache_dir().glob("smollm2-135m-*"))


SMOLLM2: dict[str, Any] = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def base_model(dtype: torch.dtype = torch.float32) -> Any:
    if in_cache():
        from alora_kernels.data import load_model

        return load_model("smollm2-135m", dtype=dtype)[0]
    return llama(dtype=dtype, **SMOLLM2)


def smollm_note() -> str:
    weights = "" if in_cache() else " with random weights: `make demo` puts the real ones into the cache"
    return f"all layers of SmolLM2-135M{weights}; k and n are its hidden size"


class Training(Pair):
    """Forward and backward of the whole batch, gradients in `.grad`."""

    direction, repeats = BOTH, 1 / 15  # a step takes seconds, not milliseconds: 4 rounds by default
    stock_name = STOCK

    def reason(self, name: str, mode: str) -> str | None:
        # a step of a whole model is long, and its optimiser would not be in the graph
        return "a training step is measured in eager mode" if mode == GRAPH else None

    def step_of(self, name: str) -> Step:
        return partial(self.step, name)

    def step(self, name: str) -> tuple[Tensor]:
        if name == STOCK:
            return (self._task_by_task(self.stock),)
        if name == ONE:
            return (self._task_by_task(self.stock, [self.tokens]),)
        if name == FROZEN:
            return (self._through_frozen(),)
        self.fused.zero_grad()
        with route(self.ids):
            loss = self._loss(self.fused, self.tokens)
        loss.backward()
        return (loss.detach(),)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        model = self.double()
        return self._of_stock(model, self._task_by_task(model))

    def results(self, name: str, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        if name == STOCK:
            return self._of_stock(self.stock, outputs[0])
        found = {"loss": outputs[0]}
        for path, layer in self.layers():
            found[f"{path} A"] = layer.asymlora_A["default"].weight.grad
            found[f"{path} B"] = layer.asymlora_B["default"].weight.grad
        return found

    def _of_stock(self, model: Any, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of stock PEFT in the shape of ALoRA's: all A in one tensor, those of B summed over tasks."""
        found, tasks = {"loss": loss}, range(self.setting.tasks)
        for path, _ in self.layers():
            lora = model.get_submodule(path)
            found[f"{path} A"] = torch.stack([lora.lora_A[str(t)].weight.grad for t in tasks])
            found[f"{path} B"] = torch.stack([lora.lora_B[str(t)].weight.grad for t in tasks]).sum(0)
        return found

    def _loss(self, model: Any, tokens: Any, **inputs: Any) -> Tensor:
        """Loss of the answers' tokens, summed, so that parts of a batch add up."""
        s = self.setting
        logits = model(**inputs or {"input_ids": tokens}, logits_to_keep=self._before_answers, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, s.tokens - s.answer :].flatten(), reduction="sum"
        )

    @cached_property
    def _before_answers(self) -> Tensor:
        s = self.setting
        return torch.arange(s.tokens - s.answer - 1, s.tokens - 1, device=s.device)

    @cached_property
    def _rows_of(self) -> Sequence[Any]:
        """The rows of each task: picking them by a mask would make the host wait for the GPU."""
        return [self.tokens[self.ids == task] for task in range(self.setting.tasks)]

    def _task_by_task(self, model: Any, parts: Sequence[Any] | None = None, **how: Any) -> Tensor:
        """What stock PEFT can do with a mixed batch: one adapter after the other, each on its part of the rows."""
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.setting.device)
        for task, rows in enumerate(parts or self._rows_of):
            model.set_adapter(str(task))
            loss = self._loss(model, rows, **how)
            loss.backward()
            total += loss.detach()
        return total

    def _through_frozen(self) -> Tensor:
        """Forward, and the gradient of the embedded tokens, which is what adapters in a model need from its layers."""
        embedded = self.frozen.get_input_embeddings()(self.tokens).requires_grad_()
        loss = self._loss(self.frozen, self.tokens, inputs_embeds=embedded)
        loss.backward()
        return loss.detach()
