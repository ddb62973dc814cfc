"""Where the rows of a batch are in what each linear layer is given: found out with a tiny batch, before any changes.

Two rows of random tokens are run, then again with all tokens of the one or the other row changed: what changed most in
a module's input belongs to that row. A last batch, of three rows, shows which dimension grows with it. The runs are
without gradients, in evaluation mode, and leave the model and torch's generators as they were.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import Context
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..routing import Layout, expand_ids
from .base_layer import outside_adapters, undo_cpu_packing

Finding = Literal["batch", "blocks", "time", "steps", "shared", "mixed", "uncalled", "unreached", "several"]
CHANNELS, SMALL = 64, 1 << 20  # channels compared; bytes of a buffer that is copied
LENGTH, DECODER_LENGTH, IMAGE, SOUND = 12, 7, 64, 4000  # tokens, pixels, samples where the config does not say
VOCABULARY = 2000
NEGLIGIBLE = 4  # times as much is what a row changes in itself, at least
TABLES = ("_parameters", "_buffers", "_modules")


class Seen(NamedTuple):
    """One call of a module: its input's leading shape, and some channels of each row."""

    leading: torch.Size
    sample: Tensor


SEVERAL = Seen(torch.Size(), torch.empty(0))  # a call that returned more than a tensor
Calls = dict[str, list[Seen]]
Batch = tuple[dict[int, Any], dict[str, Any]]  # positional and named arguments


def probe(model: nn.Module) -> dict[str, Finding] | None:
    """The layout of the rows that each leaf module of a model, with or without adapters, is given.

    A `Layout`; "shared" for inputs of no row, such as a table of positions; "mixed" where the data decide the order of
    rows; "uncalled" where a parent runs without calling the module; "unreached" where the parents do not run either;
    "several" where it returns more than a tensor. None if the model could not be run.
    """
    base: Any = getattr(model, "_orig_mod", model)
    if not isinstance(base, PreTrainedModel):
        return None
    prefix = "" if base is model else "_orig_mod."
    for (part, inside), images in product(_parts(base), (False, True)):
        findings = Context().run(_found, base, part, partial(_tiny_batches, part, images))
        if findings is not None:
            return {f"{prefix}{inside}{name}": finding for name, finding in findings.items()}
    return None


def probe_call(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], rows: int, names: Collection[str]
) -> dict[str, Finding] | None:
    """As `probe` for the modules `names`, from a batch that a model is called with, for inputs nobody can make up.

    Two of its rows are run, and again with the one in the place of the other. All tensors of `rows` rows are taken for
    the batch, also in dicts, lists and tuples. Empty if the model could not be run; None if this batch cannot tell: it
    has one row, or an argument that a forward may change, such as a cache.
    """
    given = dict(enumerate(args)), dict(kwargs)
    if rows < 2 or not _plain(list(given)):
        return None

    def batches() -> list[Batch]:
        picks = [0, 1], [1, 1], [0, 0], [0, 1, 0]
        return [(_rows(given[0], rows, picked), _rows(given[1], rows, picked)) for picked in picks]

    return Context().run(_found, model, model, batches, names) or {}


def _plain(value: Any) -> bool:
    """Whether a value is a tensor, a number or a text, or dicts, lists and tuples of such."""
    if type(value) in (list, tuple, dict):
        return all(map(_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def _rows(value: Any, rows: int, picked: list[int]) -> Any:
    """Some rows of an argument: of tensors with as many rows, and of lists with as many entries, such as lengths."""
    if isinstance(value, Tensor):
        return value[picked] if value.dim() > 0 and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {key: _rows(v, rows, picked) for key, v in value.items()}
    if not isinstance(value, list | tuple):
        return value
    batched = any(isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == rows for v in value)
    if len(value) == rows and not batched:
        return type(value)(value[i] for i in picked)
    return type(value)(_rows(v, rows, picked) for v in value)


def _found(
    model: Any, part: Any, batches: Callable[[], list[Batch]], names: Collection[str] | None = None
) -> dict[str, Finding] | None:
    """The findings of four runs; in a context of its own, where neither ids are set nor checkpoints take notes."""
    with ExitStack() as stack:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        for manager in (_quiet(), _as_it_was(model), torch.no_grad(), torch.random.fork_rng(devices)):
            stack.enter_context(manager)
        model.eval()
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer) and not layer.merged:
                layer._disable_adapters = True  # not by enable_adapters, which changes what requires a gradient
        try:
            runs = [_record(part, *batch, names) for batch in batches()]
        except Exception:  # whatever a model may ask of its inputs that these have not
            return None
    return _findings(part, runs)


def _parts(model: Any) -> Iterator[tuple[Any, str]]:
    """The model, else its backbone: heads may refuse batches that are fine for all the rest."""
    yield model, ""
    name = model.base_model_prefix
    if name and isinstance(getattr(model, name, None), PreTrainedModel):
        yield getattr(model, name), f"{name}."


def _tiny_batches(model: Any, images: bool) -> list[Batch]:
    """Two rows, the first changed, the second changed, three rows."""
    generator = torch.Generator().manual_seed(0)
    one, other, third = (probe_inputs(model, 3, generator, images) for _ in range(3))
    two = {name: value[:2] for name, value in one.items()}
    changed = [
        {name: torch.stack([other[name][i] if i == row else two[name][i] for i in range(2)]) for name in two}
        for row in range(2)
    ]
    fixed = {"use_cache": False} if "use_cache" in parameters_of(model) else {}
    return [({}, batch | fixed) for batch in (two, *changed, third)]


def _record(
    model: Any, args: dict[int, Any], kwargs: dict[str, Any], names: Collection[str] | None
) -> tuple[Calls, set[str]]:
    """One run: the inputs of every leaf, and the names of all modules that ran."""
    calls: Calls = {}
    ran: set[str] = set()

    def note(name: str, leaf: bool) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            ran.add(name)
            x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            if leaf and x is not None and x.dim() > 0:
                sample = x.detach()[..., :: max(1, x.shape[-1] // CHANNELS)].clone()
                calls.setdefault(name, []).append(Seen(x.shape[:-1], sample) if isinstance(out, Tensor) else SEVERAL)

        return hook

    handles = [
        module.register_forward_hook(note(name, _is_leaf(module) and (not names or name in names)), with_kwargs=True)
        for name, module in outside_adapters(model)
    ]
    for generator in (torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())):
        generator.manual_seed(0)  # each run draws the same numbers, such as the hashes of Reformer
    try:
        model(*args.values(), **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, ran


def _is_leaf(module: nn.Module) -> bool:
    """Whether it could be adapted, or is already."""
    return isinstance(module, BaseTunerLayer) or next(module.children(), None) is None


def _findings(model: nn.Module, runs: list[tuple[Calls, set[str]]]) -> dict[str, Finding]:
    ran = set().union(*(names for _, names in runs))
    findings: dict[str, Finding] = {}
    for name, module in model.named_modules():
        if not name or not _is_leaf(module):
            continue
        calls = [seen.get(name, []) for seen, _ in runs]
        if not any(calls):
            parent = name.rpartition(".")[0]
            findings[name] = "uncalled" if parent in ran else "unreached"
        elif any(call is SEVERAL for seen in calls for call in seen):
            findings[name] = "several"
        elif len({len(c) for c in calls}) > 1:
            findings[name] = "mixed"
        else:
            findings[name] = _together([_layout(*seen) for seen in zip(*calls, strict=True)])
    return findings


def _together(findings: list[Finding]) -> Finding:
    """One word for all calls of a module."""
    kinds = set(findings)
    if kinds == {"batch", "blocks"}:
        return "blocks"
    return kinds.pop() if len(kinds) == 1 else "shared" if "shared" in kinds else "mixed"


def _layout(two: Seen, first: Seen, second: Seen, three: Seen) -> Finding:
    """The layout of one call, from the same call in the four runs."""
    if not two.leading == first.leading == second.leading or len(two.leading) != len(three.leading):
        return "mixed"
    grown = [d for d, (a, b) in enumerate(zip(two.leading, three.leading, strict=True)) if a != b]
    if not grown:
        return "shared"
    (d, *more) = grown
    size = two.leading[d]
    if more or 2 * three.leading[d] != 3 * size or d > 1:
        return "mixed"
    candidates: tuple[Layout, ...]
    if d == 1:
        candidates = ("time",) if size == 2 else ("blocks",) if two.leading[0] == 1 else ()
    else:
        candidates = ("batch",) if size == 2 else ("blocks", "steps")
    by_first, by_second = (_change(two.sample, run.sample) for run in (first, second))
    # other rows change how many a product has, and so its rounding, or in 16 bits which expert a token just misses
    a, b = by_first * NEGLIGIBLE > by_second, by_second * NEGLIGIBLE > by_first
    if bool((a & b).all()) or (len(candidates) > 1 and not bool((a ^ b).any())):
        return "mixed"
    for layout in candidates:  # by the one that fits, what only one row can change is that row's
        owner = expand_ids(torch.arange(2, device=a.device), two.leading, layout=layout)
        if owner is not None and not bool((a & ~b & (owner != 0)).any() or (b & ~a & (owner != 1)).any()):
            return layout
    return "mixed"


def _change(sample: Tensor, other: Tensor) -> Tensor:
    """How much each row of an input differs, `[M]`."""
    difference = (sample.float() - other.float()).abs().amax(-1).reshape(-1)
    return difference.nan_to_num(nan=torch.inf)


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Put back what a forward changed: flags, caches, buffers, and modules that it replaced."""
    owners = [*model.modules(), *([model.config] if hasattr(model, "config") else [])]
    before = [dict(owner.__dict__) for owner in owners]
    tables = [[dict(kept[key]) for key in TABLES if key in kept] for kept in before]
    buffers = [(b, b.clone()) for b in model.buffers() if not b.is_meta and b.nbytes <= SMALL]
    try:
        yield
    finally:
        for buffer, value in buffers:
            buffer.copy_(value)
        for owner, kept, held in zip(owners, before, tables, strict=True):
            owner.__dict__.clear()
            owner.__dict__.update(kept)
            for table, values in zip((kept[key] for key in TABLES if key in kept), held, strict=True):
                table.clear()
                table.update(values)
            if isinstance(owner, nn.Module):
                undo_cpu_packing(owner)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence: nobody asked for this batch, so nobody wants to hear what is odd about it."""
    level, caching = transformers_logging.get_verbosity(), torch.is_autocast_cache_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    torch.set_autocast_cache_enabled(False)  # weights cast without gradients must not be found by the next forward
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_autocast_cache_enabled(caching)
        transformers_logging.set_verbosity(level)


def parameters_of(model: Any) -> list[str]:
    """The names of its forward's arguments."""
    return list(inspect.signature(model.forward).parameters)


def probe_inputs(model: Any, rows: int, generator: torch.Generator, images: bool) -> dict[str, Tensor]:
    """Random inputs of B rows, by the names of the forward's arguments: only what the model is mainly fed.

    Text for a vision-language model, because its images do not belong to rows one by one; with `images` its other
    inputs too. An AttributeError says that the config lacks what the inputs are made from.
    """
    names, main = parameters_of(model), model.main_input_name
    shape = (rows, 2, LENGTH) if type(model).__name__.endswith("ForMultipleChoice") else (rows, LENGTH)
    batch: dict[str, Tensor] = {}
    if main in ("input_ids", "inputs") or (images and "input_ids" in names):
        name = "inputs" if main == "inputs" else "input_ids"
        batch[name] = _tokens(model, shape, generator)
        if "attention_mask" in names:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    for name, make in OTHERS.items():
        if name == main or (images and name in names):
            batch[name] = torch.randn(make(model.config, rows), generator=generator).to(model.dtype)
    if "decoder_input_ids" in names and model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = _tokens(model, (rows, DECODER_LENGTH), generator)
    return {name: value.to(_device(model)) for name, value in batch.items()}


def _device(model: Any) -> Any:
    hook = getattr(model, "_hf_hook", None)
    if hook is not None:  # offloaded: accelerate moves the inputs on
        return getattr(hook, "execution_device", None) or "cpu"
    try:
        weight = getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # of a model without any
        weight = None
    return weight.device if isinstance(weight, Tensor) else model.device


def _tokens(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ids of ordinary tokens: models look for special ones, and an image token without an image is an error."""
    configs = {id(c): c for c in (model.config, model.config.get_text_config(), model.config.get_text_config(True))}
    special: set[int] = set()
    for config in configs.values():
        for name, value in config.to_dict().items():
            if name.endswith(("_id", "_ids", "_index", "_token")):
                special |= {v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, int)}
    size = min(getattr(c, "vocab_size", VOCABULARY) for c in configs.values())
    ordinary = torch.tensor([i for i in range(min(size, VOCABULARY)) if i not in special])
    return ordinary[torch.randint(len(ordinary), shape, generator=generator)]


def _pixels(config: Any, rows: int) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or IMAGE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    image = (getattr(vision, "num_channels", 3), height, width)
    frames = getattr(vision, "num_frames", None)
    return (rows, *image) if frames is None else (rows, frames, *image)


def _features(config: Any, rows: int) -> tuple[int, ...]:
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        if hasattr(config, name):
            return rows, IMAGE, getattr(config, name)
    return rows, config.num_mel_bins, 2 * config.max_source_positions


def _sound(config: Any, rows: int) -> tuple[int, ...]:
    return (rows, config.max_length, config.num_mel_bins) if hasattr(config, "num_mel_bins") else (rows, SOUND)


OTHERS = {"pixel_values": _pixels, "input_features": _features, "input_values": _sound}
