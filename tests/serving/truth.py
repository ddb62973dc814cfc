"""What the engine is compared with: each request alone, its task merged into the base, plain greedy `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from alora_kernels import set_task
from tests.support.adapters import tiny_base


def merged_models(folder: Path, tasks: Sequence[str], base: Any = None) -> dict[str | None, Any]:
    """task -> the base with that task of the folder merged in; None is the base itself."""
    base = tiny_base()[0] if base is None else base
    models: dict[str | None, Any] = {None: deepcopy(base)}
    for task in tasks:
        model = PeftModel.from_pretrained(deepcopy(base), str(folder))
        set_task(model, task)
        models[task] = model.merge_and_unload()
    return models


def alone(model: Any, ids: Sequence[int], tokens: int = 12) -> tuple[int, ...]:
    """Greedy tokens of one request."""
    prompt = torch.tensor([list(ids)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)
    return tuple(out[0, len(ids) :].tolist())
