"""An encoder that learns one or several tasks at once, with a head for each: what the experiments train.

Everything random comes from the seed: rows, adapters, heads, order. Every batch has the same number of rows of each
task, so tasks weigh the same; the loss is the mean of the tasks' losses.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alora_kernels import data, route
from alora_kernels.adapters.method import Method
from alora_kernels.baselines.methods import adapt, as_large_as_alora, target_shapes
from alora_kernels.federated.client import fit, shuffled
from alora_kernels.recipes.federated import Rows, collate, task_rows

from .config import Config
from .shared_a import SharedALinear

SHARED_A, RSLORA, VERA = "shared-a", "rslora", "vera"  # besides the methods of `baselines.methods`
EVAL_BATCH = 64
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(?:asymlora|lora|vera_lambda)_([ABdb])(?:\.default)?(?:\.weight)?$"
)


class MultiTask(nn.Module):
    """An adapted encoder with a linear head for each task; a forward takes rows of any tasks."""

    def __init__(self, encoder: nn.Module, heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, nn.ModuleList(heads)

    def forward(self, ids: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """Logits of each task's rows, in the order of tasks; `ids` `[rows]` says whose a row is."""
        with route(ids):
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.to(states.dtype).unsqueeze(2)
        pooled = (states * weight).sum(1) / weight.sum(1).clamp_min(1)
        return [head(pooled[ids == task]) for task, head in enumerate(self.heads)]


@dataclass(frozen=True, eq=False)
class Study:
    model: MultiTask
    rows: dict[str, Rows]
    pad: int

    def batch(self, chosen: Mapping[int, Tensor], split: str = "train") -> dict[str, Tensor]:
        """Rows of some tasks side by side: task number -> row numbers."""
        tasks = list(self.rows.values())
        texts = [getattr(tasks[t], split)[i] for t, numbers in chosen.items() for i in numbers.tolist()]
        targets = [getattr(tasks[t], f"{split}_target")[numbers] for t, numbers in chosen.items()]
        ids = torch.cat([torch.full((len(numbers),), t) for t, numbers in chosen.items()])
        device = next(self.model.parameters()).device
        packed = collate(texts, self.pad, left=False, device=device)
        return {"ids": ids.to(device), "targets": torch.cat(targets).to(device), **packed}

    def batches(self, steps: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
        orders = [shuffled(len(task.train), steps, batch_size) for task in self.rows.values()]
        for numbers in zip(*orders, strict=True):
            yield self.batch(dict(enumerate(numbers)))

    def train(
        self, config: Config, after: Callable[[int], None] = lambda step: None, *, rate: float | None = None
    ) -> float:
        """AdamW over the configured steps; `after(n)` is called when n are done; `rate` replaces the learning rate."""
        steps = config.number("steps")

        def announced() -> Iterator[dict[str, Tensor]]:
            for step, batch in enumerate(self.batches(steps, config.number("batch_size"))):
                after(step)
                yield batch

        loss = fit(self.model, announced(), loss_of, lr=rate or config.number("learning_rate"))
        after(steps)
        return loss

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """Task -> share of its test rows that are right; rows of similar length share a batch."""
        self.model.eval()
        found = {}
        for t, (name, task) in enumerate(self.rows.items()):
            right = 0
            for numbers in torch.tensor([len(row) for row in task.test]).argsort().split(EVAL_BATCH):
                batch = self.batch({t: numbers}, "test")
                logits = self.model(batch["ids"], batch["input_ids"], batch["attention_mask"])[t]
                right += int((logits.argmax(1) == batch["targets"]).sum())
            found[name] = right / len(task.test)
        return found


def loss_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean over the tasks in the batch of their cross entropies."""
    logits = model(batch["ids"], batch["input_ids"], batch["attention_mask"])
    present = [t for t in range(len(logits)) if len(logits[t])]
    return torch.stack([F.cross_entropy(logits[t], batch["targets"][batch["ids"] == t]) for t in present]).mean()


def study(config: Config, method: str, seed: int, *, tasks: Sequence[Any] = (), data_seed: int | None = None) -> Study:
    """A fresh model with its data; torch's generator then stands where the seed put it.

    `method` is a key of `adapters.method.METHODS`, "shared-a", "rslora" or "vera"; `tasks` defaults to all of the
    configuration, `data_seed`, which says which rows are test rows, to the seed.
    """
    chosen = tuple(tasks) or config.tasks
    base, tokenizer = _base(config.model)
    sizes = {"train_size": config.train_size, "test_size": config.test_size, "max_length": config.max_length}
    options: Any = {"causal": False, "tokenizer": tokenizer, "seed": seed if data_seed is None else data_seed, **sizes}
    rows = {(t if isinstance(t, str) else t.name): task_rows(t, None, **options) for t in chosen}
    encoder = copy.deepcopy(base)
    torch.manual_seed(seed)
    width = encoder.config.hidden_size
    adapted = _adapted(encoder, method, config, tuple(rows), seed)
    heads = [nn.Linear(width, len(task.labels)) for task in rows.values()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Study(MultiTask(adapted, heads).to(device), rows, tokenizer.pad_token_id)


def _adapted(encoder: Any, method: str, config: Config, tasks: tuple[str, ...], seed: int) -> nn.Module:
    targets: Any = config.target_modules or "all-linear"
    if method == SHARED_A:
        return _share_a(encoder, config, tasks)
    if method == VERA:
        from peft import VeraConfig, get_peft_model

        options: dict[str, Any] = {"projection_prng_key": seed, "d_initial": 0.1}
        return get_peft_model(encoder, VeraConfig(r=config.vera_r, target_modules=targets, **options))
    settings = Method(
        "lora" if method == RSLORA else method,
        tasks=tasks,
        r=config.number("r"),
        lora_alpha=config.lora_alpha,
        use_rslora=method == RSLORA,
        num_experts=config.num_experts,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type=None,
    )
    if config.budget == "parameters":
        settings = as_large_as_alora(settings, target_shapes(encoder, settings))
    return adapt(encoder, settings)


def _share_a(encoder: nn.Module, config: Config, tasks: tuple[str, ...]) -> nn.Module:
    """Every linear layer of an encoder (or those so called) with one A and a B per task; the encoder is changed."""
    encoder.requires_grad_(False)
    ends = tuple(f".{target}" for target in config.target_modules)
    for name, linear in [(name, m) for name, m in encoder.named_modules() if type(m) is nn.Linear]:
        if not config.target_modules or f".{name}".endswith(ends):
            layer = SharedALinear(linear, config.number("r"), tasks=tasks, lora_alpha=config.lora_alpha)
            encoder.set_submodule(name, layer)
    return encoder


def base_weights(config: Config) -> dict[str, Tensor]:
    return {name: m.weight.detach() for name, m in _base(config.model)[0].named_modules() if isinstance(m, nn.Linear)}


def factors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Path -> "A", "B" (of VeRA "d", "b") -> a copy of the matrix as it is now; paths are those of the base."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        match = _FACTOR.match(name.removeprefix("encoder."))
        if match:
            found.setdefault(match[1], {})[match[2]] = parameter.detach().clone().cpu()
    return found


@lru_cache(maxsize=1)
def _base(name: str) -> tuple[Any, Any]:
    """The encoder as it was read, and its tokenizer; callers copy it."""
    classifier, tokenizer = data.load_encoder(name, num_labels=2)
    return classifier.encoder, tokenizer
