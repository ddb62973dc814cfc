"""One model of the table: how it is built, what its rows look like, what is expected of it.

In:   a config of transformers; no network, no files.
Out:  `Case`, whose `build` gives a tiny model with random weights.
Who:  `cases` lists them; `judge` and `checks` run them, `table` prints them, `test_models` asserts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

VOCAB, WIDTH, HEADS, LABELS = 64, 32, 4, 3
PAD, BOS, EOS = 1, 2, 3  # 1: the padding id of RoBERTa's family, whose positions depend on it


@dataclass(frozen=True)
class Case:
    """One model of the table.

    Attributes:
        model: class name in transformers.
        family: heading under which users look for it.
        settings: arguments of its config.
        rows: which rows it takes, see `rows`.
        task_type: as in PEFT.
        targets: `target_modules`; None is PEFT's default for the model.
        generates: whether `generate` is judged.
        aux: whether the model adds a loss of its own (load balancing of experts).
        refused: a regular expression that the error of `get_peft_model` matches, if it is refused.
        merge_refused: part of the message, if a merge is refused.
        variant: what sets it apart, in words.
        exclude_modules: as in PEFT.
        pad: the padding id.
        pads_left: whether its tokenizer pads on the left.
        dtype: float64 unless the model itself computes something else there.
    """

    model: str
    family: str
    settings: Callable[[], Any]
    rows: str
    task_type: str | None
    targets: str | tuple[str, ...] | None = "all-linear"
    generates: bool = False
    aux: bool = False
    refused: str = ""
    merge_refused: str = ""
    variant: str = ""
    exclude_modules: tuple[str, ...] = ()
    pad: int = PAD
    pads_left: bool = False
    dtype: torch.dtype = torch.float64

    @property
    def name(self) -> str:
        """Its name in tests and in the table."""
        return f"{self.model}{f' ({self.variant})' if self.variant else ''}"

    def build(self) -> Any:
        """The base model, the same at every call, without dropout."""
        torch.manual_seed(7)
        settings = self.settings()
        settings._experts_implementation = "eager"  # the others know no float64
        model = getattr(tf, self.model)(settings).to(self.dtype).eval()
        generator = torch.Generator().manual_seed(11)
        for module in model.modules():
            _enliven(module, generator)
            _quieten(module, self.dtype)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        return model


def _enliven(module: nn.Module, generator: torch.Generator) -> None:
    """Weights of unit gain instead of 0.02: what leaks between rows is then as large as the outputs."""
    if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
        fan_in = 1 if isinstance(module, nn.Embedding) else module.weight.shape[isinstance(module, nn.Linear)]
        module.weight.data.normal_(0, fan_in**-0.5, generator=generator)
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(0, 0.1, generator=generator)
    for parameter in module._parameters.values():
        if parameter is not None and parameter.dim() == 3:  # experts
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)


def _quieten(module: nn.Module, dtype: torch.dtype) -> None:
    """No dropout of any kind, so that training mode computes what evaluation does."""
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    for name, value in list(vars(module).items()):
        if value is torch.float32:  # the dtype of a router
            setattr(module, name, dtype)
        if isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(module, name, 0.0)
