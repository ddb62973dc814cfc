"""As much of lm-evaluation-harness 0.4.13 as is called: CI lacks it, `make verify-lm-eval` runs the real one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

PROMPTS = ((5, 9, 7, 2, 8), (11, 4, 6, 3, 10))  # two rows of a batch, whose last token is the answer


class HFLM:
    """One forward of two rows at once, and one generation, through the two methods that the real one has for them."""

    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_size: int = 1) -> None:
        self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
        with torch.no_grad():
            return self.model(inps).logits

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        return self.model.generate(input_ids=context, max_length=max_length, do_sample=False, **kwargs)

    def loglikelihood(self) -> list[float]:
        return answers_of(self._model_call(torch.tensor(PROMPTS)[:, :-1]))

    def generate(self) -> list[list[int]]:
        return self._model_generate(torch.tensor(PROMPTS), max_length=9, stop=[]).tolist()


def answers_of(logits: Any) -> list[float]:
    """Log-likelihoods of the last tokens of `PROMPTS` from logits `[2, T - 1, V]`."""
    answers = torch.tensor([prompt[-1] for prompt in PROMPTS])
    return logits[:, -1].double().log_softmax(-1).gather(1, answers[:, None])[:, 0].tolist()


class TaskManager:
    def __init__(self, include_path: str | None = None) -> None:
        self.include_path = include_path


def simple_evaluate(
    model: HFLM, tasks: Sequence[str], *, task_manager: TaskManager, log_samples: bool, num_fewshot: Any, limit: Any
) -> dict[str, Any]:
    if "nosuch" in tasks:
        raise KeyError("Spec 'nosuch' is not a registered task/group/tag name or valid YAML path")
    first, second = model.loglikelihood()
    numbers = {"alias": "row", "first,none": first, "first_stderr,none": 0.5, "second,none": second, "sample_len": 2}
    asked = {"folder": task_manager.include_path, "limit": limit, "num_fewshot": num_fewshot}
    return {"results": dict.fromkeys(tasks, numbers | asked)}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """`import lm_eval` finds the above."""
    names = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__path__": []},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.api": {"__path__": []},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
        "lm_eval.models": {"__path__": []},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    for name, contents in names.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "alora_kernels.integrations.lm_eval", raising=False)
    known = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0-stub" if name == "lm_eval" else known(name))
    yield
    sys.modules.pop("alora_kernels.integrations.lm_eval", None)
