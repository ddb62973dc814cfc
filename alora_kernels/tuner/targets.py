"""Which of the modules that `target_modules` matched an adapter can have, and what is said about the others.

`ALoRAModel` and the baselines ask before they touch the model. What is left alone, by what `probe` found, is named in
one warning and written into `exclude_modules`, so that a saved adapter has the same modules when it is loaded.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import (
    _check_lora_target_modules_mamba,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..routing import Layout
from ..text import some
from .base_layer import base_of, outside_adapters, quantization_backend, refuse_split
from .probe import Finding

EXAMPLES = 4  # patterns of names shown for each reason
DIRECT = "their weights are used without calling them, at least by fast kernels, so an adapter would do nothing"
REASONS: Mapping[str | None, str] = {
    "uncalled": "they are not called for an ordinary batch, so nobody knows which rows they would see",
    "unreached": "a batch of the model's main input does not reach them, and images or sound have rows of their own",
    "shared": "they see inputs of no row, such as a table of positions",
    "mixed": "they see rows in an order that the data decide, as routed experts do",
    "several": "they return more than one tensor, as some routers do",
}
ALWAYS = {DIRECT, REASONS["several"]}  # whether or not rows matter
ROUTED_EXPERT = re.compile(r"(^|\.)experts\.(expert_)?\d+\.")
HOW = 'target_parameters="all-experts" adapts experts'
FUSED = {"gate_up_proj": {"gate_proj", "up_proj", "w1", "w3"}, "down_proj": {"w2"}}  # names that older versions had


def targets_of(model: nn.Module, config: Any) -> list[str]:
    """The modules that the config matches, "all-linear" included, in the order of the model."""
    matching = _maybe_include_all_linear_layers(copy.copy(config), model)
    return [name for name, _ in outside_adapters(model) if name and check_target_module_exists(matching, name)]


def check_target(model: nn.Module, name: str, tasks: int, split: bool = False) -> None:
    """Raise a ValueError with the remedy unless it is a linear layer that ids of so many tasks can be used at.

    `split` says that processes may share its weight.
    """
    base, parent = base_of(model.get_submodule(name)), _parent(model, name)
    if not split:
        refuse_split(base, name)
    kind, leave_out = type(base).__name__, f"leave it out of target_modules or add it to exclude_modules: {name!r}"
    if isinstance(base, nn.Embedding):
        why = f"is an {kind}: ALoRA adapts linear layers. To train it, put it in modules_to_save, or {leave_out}"
    elif isinstance(base, nn.modules.conv._ConvNd):
        around = "ALoRA adapts linear layers; of a convolution adapt the linear layers around it and"
        why = f"is a {kind}: {around} {leave_out}"
    elif isinstance(parent, nn.MultiheadAttention) or isinstance(base, nn.MultiheadAttention):
        reads = "which multiplies by its weights without calling a layer, so an adapter would do nothing"
        why = f"belongs to nn.MultiheadAttention, {reads}: {leave_out}, or use a model with separate projection layers"
    elif not (isinstance(base, nn.Linear | Conv1D) or _says_features(base)):
        why = f"is a {kind}, which is not a linear layer: {leave_out}"
    elif ROUTED_EXPERT.search(name + ".") and tasks > 1:
        order = "it sees rows of the batch in another order, so task ids would not fit them"
        why = f'is a routed expert: {order}. Use routing="soft" for it, or {leave_out}'
    else:
        return
    raise ValueError(f"{name} {why}")


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _says_features(base: nn.Module) -> bool:
    """Whether it calls itself linear, or is a quantised layer that PEFT knows."""
    if (hasattr(base, "in_features") and hasattr(base, "out_features")) or hasattr(base, "infeatures"):
        return True
    try:
        return quantization_backend(base) is not None
    except Exception:  # a backend that is installed but broken must not decide about other modules
        return False


def rows_of(model: nn.Module, name: str, findings: Mapping[str, Finding] | None) -> Layout | None:
    """Where the rows are in what a module is given, by the probe or by a parent that says so; None if nobody knows."""
    parent = _parent(model, name)
    if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return "batch" if parent.self_attn.batch_first else "time"
    finding: Any = (findings or {}).get(name)
    return None if finding in REASONS else finding


def listened_to(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: without any, the fast path of torch's encoder reads weights and calls no layer."""


def keep_dense(model: nn.Module, dense: bool = True) -> None:
    """Let torch's encoders make no nested tensors of padded batches, which only their fast path can take, or again."""
    encoders: list[Any] = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]
    for module in encoders:
        if dense and getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor, module.nested_before = False, True
        elif not dense and module.__dict__.pop("nested_before", False):
            module.use_nested_tensor = True


def leave_out(model: nn.Module, config: Any, findings: Mapping[str, Finding] | None, tasks: int) -> None:
    """Add to the config's exclude_modules what its adapter cannot serve, with one warning.

    With several `tasks` that is every module of which the rows are unknown; with one, or a learned router, rows do not
    matter. A ValueError if no module would be left, or if one that was named has a weight that is used without a call.
    """
    everything = isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
    targets = targets_of(model, config)
    reasons: dict[str, str] = {}
    for name in targets:
        finding = None if findings is None else findings.get(name)
        of_attention = isinstance(_parent(model, name), nn.MultiheadAttention)
        if (everything and of_attention) or _used_directly(model, name, finding):
            reasons[name] = DIRECT
        elif finding == "several" or (tasks > 1 and finding in REASONS):
            reasons[name] = REASONS[finding]
        elif tasks > 1 and ROUTED_EXPERT.search(f"{name}."):
            reasons[name] = REASONS["mixed"]
    if not reasons:
        return
    text = _text(reasons)
    if len(reasons) == len(targets) or (not everything and ALWAYS & set(reasons.values())):
        raise ValueError(f"ALoRA cannot adapt these target_modules:\n{text}")
    if isinstance(config.exclude_modules, str):
        config.exclude_modules = "|".join([f"(?:{config.exclude_modules})", *map(re.escape, reasons)])
    else:
        config.exclude_modules = {*(config.exclude_modules or ()), *reasons}
    warnings.warn(
        f"ALoRA leaves {len(reasons)} of {len(targets)} target modules alone (now in exclude_modules):\n{text}",
        stacklevel=2,
    )


def _used_directly(model: nn.Module, name: str, finding: Finding | None) -> bool:
    """Whether a module that holds this one computes with its weight itself."""
    parent, leaf = _parent(model, name), name.rpartition(".")[2]
    like_lora: Any = SimpleNamespace(peft_type="LORA")
    try:  # state-space models, by PEFT's own list
        _check_lora_target_modules_mamba(like_lora, model, leaf)
    except ValueError:
        return True
    if finding != "uncalled" and not hasattr(parent, "A_log"):
        return False
    try:
        source = inspect.getsource(type(parent))
    except (OSError, TypeError):
        return False
    return bool(re.search(rf"self\.{leaf}\.weight\b(?!\.(?:device|dtype|shape|size))", source))


def _text(reasons: Mapping[str, str]) -> str:
    """One line for each reason, with the names of which numbers do not differ."""
    lines = []
    for reason, names in by_reason(reasons).items():
        shown = _patterns(names) if len(names) > EXAMPLES else names
        lines.append(f"- {len(names)}, because {reason}: {some(shown, EXAMPLES)}")
    if set(reasons.values()) - ALWAYS:
        lines.append('A learned router (routing="soft") or an adapter with one task needs no rows and can have them.')
    return "\n".join(lines)


def by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    """Reason -> names, from name -> reason."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return names


def _patterns(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(re.sub(r"\d+", "*", name) for name in names))


def tell_unmatched(model: nn.Module, config: Any) -> None:
    """Warn, once and with what may be meant, of target_modules that match nothing; PEFT refuses them where all do."""
    asked = config.target_modules
    if isinstance(asked, str) or not asked:
        return
    modules = [name for name, _ in outside_adapters(model)]
    stacked = [
        name.rpartition(".")[0::2] for name, _ in model.named_parameters()
    ]  # `tell_fused_experts` tells of these
    known = [*modules, *(f"{name}.{key}" for name, own in stacked for key in {own, *FUSED.get(own, ())})]
    lost = [name for name in sorted(asked) if not any(f".{one}".endswith(f".{name}") for one in known)]
    if not lost or len(lost) == len(asked):
        return
    said = []
    for name in lost:
        tails = {".".join(one.split(".")[-1 - name.count(".") :]) for one in modules}
        close = difflib.get_close_matches(name, sorted(tails), n=1, cutoff=0.7)
        said.append(name + (f" (did you mean {close[0]}?)" if close else ""))
    warnings.warn(f"target_modules: no module of this model is called {', '.join(said)}", stacklevel=2)


def tell_fused_experts(model: nn.Module, config: Any, adapted: Sequence[str] = ()) -> None:
    """Warn, once and with the names, of experts and their routers that the config asks for and that are no layers.

    Not of those that are `adapted` as parameters.
    """
    fused = {
        f"{name}.{key}".removeprefix("."): key
        for name, module in model.named_modules()
        if "expert" in (name.rpartition(".")[2] + type(module).__name__).lower() and not isinstance(module, nn.Linear)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    }
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        beside = {f"{name.rsplit('.', 2)[0]}.{leaf}" for name in fused for leaf in ("gate", "router")}
        others = {n: m for n, m in model.named_modules() if n in beside and not isinstance(m, nn.Linear)}
        routers = [f"{name}.weight" for name, module in others.items() if "weight" in module._parameters]
        missed = [*(name for name in fused if name not in adapted), *routers]
    else:
        wanted = set() if isinstance(targets, str) else set(targets or ())
        missed = [
            name
            for name, key in fused.items()
            if name not in adapted
            and (
                check_target_module_exists(config, name)
                or wanted & ({key, name.rpartition(".")[0], "experts"} | FUSED.get(key, set()))
            )
        ]
    if missed:
        warnings.warn(
            f"ALoRA adapts layers, and {len(missed)} tensors of experts or their routers are parameters, so they get no"
            f" adapter: {some(_patterns(missed), EXAMPLES)}" + ("" if adapted else f"; {HOW}"),
            stacklevel=2,
        )
