"""What a recipe needs of a device's memory, predicted from the model's config: `alora plan`. No weight is read.

Weights, adapters and the optimiser's state are counted. What a step saves for its backward is counted too: models of
one and of two layers are run on tensors that have shapes and no numbers, and autograd says what it keeps and what lives
at once; the rest of the layers is the same again.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import statistics
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from .. import data, precision
from ..baselines.methods import adapt, parameters_of
from ..routing import ConstantRouting, route
from ..text import size
from ..training.chunked_loss import CHUNK, CHUNK_BYTES_CUDA
from ..training.rules import base_model
from . import display
from .job import Run, max_length, read, schedule, sized, steps_of_epoch
from .recipe import Recipe

CONTEXT = {"cuda": 0.6e9, "cpu": 0.7e9}  # bytes of the CUDA context and its libraries; of the process and its modules
SLACK = 0.05  # of what comes and goes: blocks of the allocator that nothing fits into
BITS = {"4bit": 4.127, "8bit": 8.02}  # a weight with its scales: 8 bits per 64 weights, those in float32 per 256
STATE = {"adamw": 8.0, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04, "adafactor": 0.1, "sgd": 0.0}  # bytes a parameter
UNMASKED = "planned"  # torch's attention, whose rows have no padding
ASSUMED = 2048  # tokens of a row where neither max_length nor the rows are known
COMMON = (24e9, 48e9, 80e9)  # bytes of GPUs
TOY = 50_000_000  # parameters, of a model beside which the libraries are large
RSS_UNIT = 1 if sys.platform == "darwin" else 1024
SAMPLE = 1000  # training rows whose lengths are looked at


@dataclass(frozen=True)
class Rows:
    """The training rows, as far as a plan needs them; lengths in tokens, of the first rows of the mix."""

    tasks: tuple[str, ...]
    count: int
    longest: int
    mean: float
    spread: float  # standard deviation
    answered: float  # share of tokens that have a loss
    epoch: int  # steps of an epoch
    steps: int  # of the whole run


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


def plan(recipe: Recipe, given: str | None = None, processes: int = 1) -> dict[str, Any]:
    """What `alora plan` shows: bytes by what they are for on one GPU, and what to change where they do not fit.

    The GPU's memory may be given, such as 24GB; None takes the one that is here, else the first of `COMMON`.
    """
    memory, at_once = None if given is None else _bytes(given), recipe.rows_at_once(processes)
    if memory is None and torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    rows = rows_of(recipe)
    facts = facts_of(recipe, rows)
    found = parts(facts, recipe, processes)
    total = sum(found.values())
    changes = remedies(facts, recipe, memory or COMMON[0], processes)
    return {
        "predicted": True,
        "model": recipe.model,
        "parameters": facts.linear + facts.other,
        "trained": facts.adapter,
        "rows_at_once": at_once,
        "tokens_of_a_row": facts.length,
        "length_assumed": recipe.max_length is None and rows is None,
        "bytes": {name: round(value) for name, value in found.items()},
        "total": round(total),
        "fits": {f"{device / 1e9:.3g} GB": total <= device for device in ((memory,) if memory else COMMON)},
        "changes": [{"change": change, "total": round(after)} for change, after in changes],
        "data": dataclasses.asdict(rows) if rows else None,
    }


def _bytes(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|GB|GiB)?", text.strip(), re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"--memory must be a size in GB, such as 24GB or 80GiB, got {text!r}")
    return float(match[1]) * (2**30 if (match[2] or "").lower() == "gib" else 1e9)


def show(found: dict[str, Any]) -> None:
    """Print a plan."""
    cells = [(name, size(value)) for name, value in {**found["bytes"], "total": found["total"]}.items()]
    at_once = f"{found['rows_at_once']} x {found['tokens_of_a_row']} tokens at once"
    display.say(f"PREDICTED memory of a GPU in a step: {at_once}")
    if found["length_assumed"]:
        said = "the length is assumed: there is no max_length, and the rows or the tokenizer are not here"
        display.say(said, "yellow")
    display.console.print(display.table("", ("for", "bytes"), cells))
    display.say(f"{found['parameters'] / 1e9:.3g} G parameters, {found['trained'] / 1e6:.3g} M of adapters train")
    if rows := found["data"]:
        rows_and_tokens = f"{rows['count']} training rows, about {rows['count'] * rows['mean']:.3g} tokens"
        display.say(f"{rows_and_tokens}, {rows['epoch']} steps an epoch; {rows['steps']} steps in all")
    else:
        display.say("the rows' lengths are not known here, so every row is taken to be as long as max_length")
    for device, fits in found["fits"].items():
        display.say(f"{device}: {'fits' if fits else 'does not fit'}", "green" if fits else "red")
    if found["changes"]:
        display.say("to need less, one after the other:")
    for change in found["changes"]:
        display.say(f"  {change['change']}  ->  {size(change['total'])}")


def peak(run: Run, device: str) -> str:
    """A line with the most memory that this process has used, beside the prediction unless the model is a toy."""
    if device == "cuda":
        most, of = float(torch.cuda.max_memory_allocated()), "GPU memory"
    else:
        try:
            import resource
        except ImportError:
            return "peak of memory: this system (Windows) does not tell it"
        most, of = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT, "memory"
    said = f"peak of {of}: {size(most)}"
    if run.model.num_parameters() < TOY:
        return said
    some = run.train.select(range(min(SAMPLE, len(run.train))))
    try:
        rows = _rows(run.recipe, run.train["task"], some, run.validation is not None)
        found = parts(facts_of(run.recipe, rows, device), run.recipe, PartialState().num_processes)
    except ValueError as error:  # the run itself is fine
        return f"{said}; not predicted: {error}"
    total = sum(found.values()) - (CONTEXT["cuda"] if device == "cuda" else 0)  # which torch does not count
    return f"{said}; PREDICTED {size(total)}"


def rows_of(recipe: Recipe) -> Rows | None:
    """The training rows of files and built-in tasks, if the model's tokenizer is on this machine."""
    sources = [data.as_source(task) for task in recipe.tasks]
    if recipe.streaming or not all(getattr(source, "is_file", True) for source in sources):
        return None
    try:
        tokenizer = data.load_tokenizer(recipe.model)
    except OSError:
        return None
    text = read(recipe, data.Lost())
    length = max_length(recipe, tokenizer)
    some = text["train"].select(range(min(SAMPLE, len(text["train"]))))
    _, ids = data.encode_splits(DatasetDict(train=some), tokenizer, length, chat_template=recipe.chat_template)
    return _rows(recipe, text["train"]["task"], ids["train"], "validation" in text)


def _rows(recipe: Recipe, tasks: Sequence[str], encoded: Dataset, validates: bool) -> Rows:
    """Of all rows their tasks, of some their token ids."""
    lengths = [len(ids) for ids in encoded["input_ids"]]
    asked = sum(label != data.IGNORE for labels in encoded["labels"] for label in labels)
    mean, spread = statistics.fmean(lengths), statistics.pstdev(lengths)
    steps = steps_of_epoch(recipe, tasks), schedule(recipe, tasks, validates=validates).total
    return Rows(tuple(sorted(set(tasks))), len(tasks), max(lengths), mean, spread, asked / sum(lengths), *steps)


def facts_of(recipe: Recipe, rows: Rows | None, device: str = "cuda") -> Facts:
    """Look at the model's config; a ValueError where there is none, or the model cannot be run without numbers."""
    wish = "bfloat16" if device == "cuda" and recipe.dtype == "auto" else recipe.dtype
    dtype = precision.explain(device, wish).dtype
    try:
        config = data.load_config(recipe.model)
    except OSError as error:
        raise ValueError(
            f"{error}\nA plan needs no weights: a folder that holds the model's config.json will do"
        ) from None
    try:
        return _facts(recipe, rows, device, config, dtype)
    except ValueError:
        raise
    except Exception as error:  # whatever a model may ask of its inputs that have no numbers
        raise ValueError(f"{recipe.model}: this kind of model cannot be run without its numbers ({error})") from error


def _facts(recipe: Recipe, rows: Rows | None, device: str, config: Any, dtype: torch.dtype) -> Facts:
    text = config.get_text_config()
    unknown = ASSUMED if recipe.max_length is None and rows is None else None
    known = (recipe.max_length, rows and rows.longest, unknown, getattr(text, "max_position_embeddings", None))
    length = min((number for number in known if number), default=ASSUMED)
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    base = _built(config, dtype)
    tasks = rows.tasks if rows else tuple(data.as_source(task).name for task in recipe.tasks)
    method, shapes = sized(recipe, tasks, base)
    head = base.get_output_embeddings()
    linear = [m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    # a LoRA per task divides the rows by their ids, which are numbers; it keeps what ALoRA does
    same = dataclasses.replace(method, name="alora") if method.name == "lora-per-task" else method
    if isinstance(same.target_parameters, tuple):  # which may name layers that the short models have not
        same = dataclasses.replace(
            same, target_parameters=tuple({re.sub(r".*\.\d+\.", "", name) for name in same.target_parameters})
        )
    runs = [_run(adapt(_built(_with_layers(config, count), dtype), same), length) for count in (1, 2)]
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
    count, known = recipe.batch_size / processes / recipe.gradient_accumulation, facts.rows
    packed = recipe.packing is True or (recipe.packing == "auto" and facts.device == "cpu")
    tokens, layer = count * facts.length, facts.saved
    if packed and known:
        tokens = min(tokens, count * known.mean + 2 * math.sqrt(count) * known.spread)
    elif not packed and count > 1 and (known is None or known.spread):
        # attention keeps a mask of the padding, and keys and values for every head
        layer += facts.length * facts.size * (facts.length + facts.repeated)
    times = tokens / facts.length
    kept, passing = times * (facts.layers * layer + facts.outside), times * facts.passing
    if recipe.gradient_checkpointing:  # the input of each layer, and one layer at a time
        kept = tokens * facts.layers * facts.width * facts.size + times * facts.outside
        passing += times * layer
    passing += facts.largest * facts.size * bool(recipe.load_in)
    asked = tokens * (known.answered if known else 1.0)
    chunk = min(asked, max(CHUNK, CHUNK_BYTES_CUDA // (4 * facts.vocabulary)) if facts.device == "cuda" else CHUNK)
    logits = chunk * facts.vocabulary * 8  # gone before the layers' backward begins
    bits = 8 * facts.size if recipe.load_in is None else BITS[recipe.load_in]
    shards = processes if recipe.parallel == "fsdp" else 1
    found = {
        "weights": (facts.linear * bits / 8 + facts.other * facts.size) / shards,
        "adapters": 4.0 * facts.adapter,
        "gradients": 4.0 * facts.adapter,
        "optimiser": STATE[recipe.optimizer] * facts.adapter,
        "activations": kept + passing,
        "logits and loss": 2 * asked * facts.width * facts.size + max(0.0, logits - passing),
    }
    moving = found["activations"] + found["logits and loss"]
    return found | {"framework": CONTEXT[facts.device] + SLACK * moving}


def remedies(facts: Facts, recipe: Recipe, memory: float, processes: int = 1) -> Iterator[tuple[str, float]]:
    """Changes that need less memory, each on top of those before, and the new total, until it fits."""
    rows, halved = recipe.batch_size // processes, facts.length // 2
    changes: list[tuple[str, Any]] = [("gradient_checkpointing", True)]
    changes += [("packing", True)] if facts.rows and facts.rows.longest > 1.2 * facts.rows.mean else []
    changes += [("gradient_accumulation", rows), ("max_length", halved)]
    quantises = recipe.method in ("alora", "alora-soft", "lora") and recipe.parallel == "ddp"
    changes += [("load_in", "4bit")] if quantises else []
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
        key, count = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            self.now -= count
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += count
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
        for layer in model.modules():
            if getattr(layer, "rows", True) is None:
                layer.rows = True  # where its rows are, which one row cannot tell
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
