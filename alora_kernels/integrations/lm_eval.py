"""One task of an ALoRA model in EleutherAI's lm-evaluation-harness, whose own `HFLM` knows of no tasks.

Importing this registers the model type "alora" with the harness; it needs the extra `lm-eval`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from ..modules.adapter import BASE, task_id
from ..routing import route


@register_model("alora")
class ALoRALM(HFLM):
    """`HFLM` with one of our tasks for all of its rows: every forward and every generation runs under `route`.

    Args:
        pretrained: a PEFT model, or as for `HFLM` a base's name with `peft=` the adapter's folder or hub id.
        task: name or id; "__base__" is the base alone. Else a ValueError, but for an adapter of one or none.
        kwargs: those of `HFLM`. A file given as `use_cache` keeps answers by request alone: give each task its own.

    Example:
        >>> lm_eval.simple_evaluate(ALoRALM(model, task="math", tokenizer=tokenizer), tasks=["gsm8k"])
    """

    def __init__(self, pretrained: Any, task: str | int | None = None, **kwargs: Any) -> None:
        super().__init__(pretrained, **kwargs)
        configs = getattr(self.model, "peft_config", {})
        tasks = getattr(configs.get(getattr(self.model, "active_adapter", None)), "tasks", None) or []
        if task is None and len(tasks) > 1:
            raise ValueError(f"the adapter has several tasks: give task= one of {', '.join(tasks)} or {BASE}")
        if task is not None and not tasks:
            raise ValueError(f"task={task!r}: the model has no tasks to choose from: leave task out")
        self.task = None if task is None else task_id(task, tasks)

    def _routed(self, rows: Tensor) -> AbstractContextManager[Any]:
        return nullcontext() if self.task is None else route([self.task] * len(rows))

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._routed(inps):
            return super()._model_call(inps, *args, **kwargs)  # type: ignore[no-any-return]

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with self._routed(context):
            return super()._model_generate(context, *args, **kwargs)  # type: ignore[no-any-return]
