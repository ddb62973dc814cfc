"""What a recipe needs of a device's memory, predicted from the model's config: `alora plan`. No weight is read.

Weights, adapters and the optimiser's state are counted. What a step saves for its backward is counted too: models of
one and of two layers are run on tensors that have shapes and no numbers, and autograd says what it keeps and what lives
at once; the rest of the layers is the same again.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from .. import data, precision
from ..baselines.methods import adapt, as_large_as_alora, parameters_of, target_shapes
from ..routing import ConstantRouting, route
from ..training.chunked_loss import CHUNK, CHUNK_BYTES_CUDA
from ..training.rules import base_model
from .recipe import Recipe

CONTEXT = {"cuda": 0.6e9, "cpu": 0.7e9}  # bytes of the CUDA context and its libraries; of the process and its modules
SLACK = 0.05  # of what comes and goes: blocks of the allocator that nothing fits into
BITS = {"4bit": 4.127, "8bit": 8.02}  # a weight with its scales: 8 bits per 64 weights, those in float32 per 256
STATE = {"adamw": 8.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04, "adafactor": 0.1, "sgd": 0.0}  # bytes a parameter
UNMASKED = "planned"  # torch's attention, whose rows have no padding
SAMPLE = 1000  # rows of the training data whose lengths are looked at


@dataclass(frozen=True)
class Rows:
    """The training rows, as far as they are known."""

    count: int
    longest: int  # tokens, of the rows looked at
    mean: float
    spread: float  # standard deviation
    answered: float  # share of tokens that have a loss


@dataclass(frozen=True)
class Facts:
    """What does not depend on the settings that a plan may change."""

    linear: int  # weights that `load_in` puts in few bits
    other: int
    largest: int  # weights of the largest linear layer, which is put in full for its product
    adapter: int  # parameters that train
    layers: int
    width: int  # of the hidden states
    vocabulary: int
    size: int  # bytes of a number in the base's dtype
    repeated: int  # numbers that keys and values of a token lack of those of every head
    length: int  # tokens of a row that the following is of
    saved: float  # bytes that a layer keeps for its backward
    outside: float  # bytes that are kept outside the layers
    passing: float  # bytes that live beside these while a layer is differentiated
    rows: Rows | None
    device: str


def facts_of(recipe: Recipe, device: str = "cuda") -> Facts:
    """Look at the model's config and, where they are at hand, at the rows. A ValueError where no config is."""
    dtype = (
        precision.explain(device, recipe.dtype).dtype if device == "cpu" or recipe.dtype != "auto" else torch.bfloat16
    )
    try:
        config = data.model_config(recipe.model)
    except OSError as error:
        raise ValueError(
            f"{error}\nFor a plan a folder with the model's config.json alone is enough: model: that folder"
        ) from None
    text = config.get_text_config()
    rows = _rows(recipe, getattr(text, "max_position_embeddings", None))
    length = min(n for n in (recipe.max_length, rows and rows.longest, _context(text)) if n)
    base = _built(config, dtype)
    tasks = tuple(data.as_source(task).name for task in recipe.tasks)
    method = recipe.adapters(tasks)
    shapes = target_shapes(base, method)
    method = as_large_as_alora(method, shapes) if recipe.budget == "parameters" else method
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head = base.get_output_embeddings()
    linear = [m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    runs = [_run(adapt(_built(_with_layers(config, count), dtype), method), length) for count in (1, 2)]
    saved = runs[1][0] - runs[0][0]
    return Facts(
        linear=sum(linear),
        other=sum(p.numel() for p in base.parameters()) - sum(linear),
        largest=max(linear),
        adapter=parameters_of(method.name, method.r, shapes, tasks=len(tasks), num_experts=method.num_experts),
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        size=dtype.itemsize,
        repeated=2 * (heads - groups) * (getattr(text, "head_dim", None) or text.hidden_size // heads),
        length=length,
        saved=saved,
        outside=runs[0][0] - saved,
        passing=runs[1][1] - runs[1][0],
        rows=rows,
        device=device,
    )


def parts(facts: Facts, recipe: Recipe, processes: int = 1) -> dict[str, float]:
    """Bytes by what they are for, at the moment of a step when they are most."""
    rows = recipe.batch_size / processes / recipe.gradient_accumulation
    tokens, padded = rows * facts.length, recipe.packing is not True and rows > 1
    if recipe.packing is True or (recipe.packing == "auto" and facts.device == "cpu"):
        padded = False
        if facts.rows:
            tokens = min(tokens, rows * facts.rows.mean + 2 * math.sqrt(rows) * facts.rows.spread)
    times = tokens / facts.length
    layer = facts.saved
    if padded:  # its attention keeps a mask, and keys and values for every head
        layer += facts.length * facts.size * (facts.length + facts.repeated)
    kept = facts.layers * layer
    if recipe.gradient_checkpointing:  # the input of each layer, and one layer at a time
        kept = facts.layers * facts.length * facts.width * facts.size + layer
    asked = tokens * (facts.rows.answered if facts.rows else 1.0)
    chunk = min(asked, max(CHUNK, CHUNK_BYTES_CUDA // (4 * facts.vocabulary)) if facts.device == "cuda" else CHUNK)
    bits = 8 * facts.size if recipe.load_in is None else BITS[recipe.load_in]
    found = {
        "weights": facts.linear * bits / 8 + facts.other * facts.size,
        "adapters": 4.0 * facts.adapter,
        "gradients": 4.0 * facts.adapter,
        "optimiser": STATE[recipe.optimizer] * facts.adapter,
        "activations": times * (kept + facts.outside + facts.passing)
        + facts.largest * facts.size * bool(recipe.load_in),
        "logits and loss": 2 * asked * facts.width * facts.size + chunk * facts.vocabulary * (4 + 2 * facts.size),
    }
    moving = found["activations"] + found["logits and loss"]
    return found | {"framework": CONTEXT[facts.device] + SLACK * moving}


def remedies(facts: Facts, recipe: Recipe, memory: float, processes: int = 1) -> Iterator[tuple[str, float]]:
    """Changes that need less memory, each on top of those before, and the new total, until it fits."""
    rows, halved = recipe.batch_size // processes, facts.length // 2
    changes: list[tuple[str, Any]] = [("gradient_checkpointing", True)]
    changes += [("packing", True)] if facts.rows and facts.rows.longest > 1.2 * facts.rows.mean else []
    changes += [("max_length", halved), ("gradient_accumulation", rows)]
    changes += [("load_in", "4bit")] if recipe.method in ("alora", "alora-soft", "lora") else []
    total = sum(parts(facts, recipe, processes).values())
    for key, value in changes:
        if total <= memory:
            return
        if getattr(recipe, key) == value:
            continue
        recipe = recipe.instead(**{key: value})
        if key == "max_length":
            share = halved / facts.length
            scaled = {name: getattr(facts, name) * share for name in ("saved", "outside", "passing")}
            facts = dataclasses.replace(facts, length=halved, **scaled)
        before, total = total, sum(parts(facts, recipe, processes).values())
        if total < before:
            yield f"{key}: {str(value).lower()}", total


def _built(config: Any, dtype: torch.dtype) -> Any:
    """The model of a config, without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


def _with_layers(config: Any, count: int) -> Any:
    """The config of a model with so many layers, which are the first ones where layers differ."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return config


class _Living(TorchDispatchMode):
    """Bytes of the tensors that live at once, the most since the mode began; `known` are storages that do not count."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: dict[int, Any] = dict.fromkeys(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


def _run(model: Any, length: int) -> tuple[int, int]:
    """Bytes that the forward of a row keeps for its backward, and the most that live in forward and backward.

    The output layer is left out: the loss asks it for a chunk of positions at a time.
    """
    kept: dict[int, Any] = {}
    AttentionInterface.register(UNMASKED, sdpa_attention_forward)
    AttentionMaskInterface.register(UNMASKED, lambda *args, **kwargs: None)
    base = base_model(model)
    base.set_attn_implementation(UNMASKED)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()
        for module in model.modules():
            if isinstance(module, BaseTunerLayer) and getattr(module, "rows", True) is None:
                module.rows = True  # where its rows are, which one row cannot tell
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in own:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        ids = torch.zeros(1, length, dtype=torch.long)
        with _Living(own) as living, route(ConstantRouting(0)):
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                states = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
            kept.clear()
            states.backward(torch.ones_like(states))
    return saved, living.most


def _context(text: Any) -> int:
    """Tokens that the model can read."""
    return getattr(text, "max_position_embeddings", None) or 2048


def _rows(recipe: Recipe, context: int | None) -> Rows | None:
    """The training rows' lengths, where files and the tokenizer lie on this machine."""
    tokenizer = data.tokenizer_at_hand(recipe.model)
    sources = [data.as_source(task) for task in recipe.tasks]
    if tokenizer is None or recipe.streaming or not all(getattr(source, "is_file", True) for source in sources):
        return None
    sizes = recipe.model_dump(include={"seed", "train_size", "test_size"})
    train = data.load_tasks(recipe.tasks, **sizes)["train"]
    more = {} if recipe.chat_template is None else {"chat_template": recipe.chat_template}
    encoded = data.encode(train.select(range(min(SAMPLE, len(train)))), tokenizer, recipe.max_length or context, **more)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    asked = sum(label != data.IGNORE for labels in encoded["labels"] for label in labels)
    return Rows(len(train), max(lengths), statistics.fmean(lengths), statistics.pstdev(lengths), asked / sum(lengths))
