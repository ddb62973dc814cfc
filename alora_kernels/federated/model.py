"""From a base model to a client's model, and from its parameters to what travels, what stays and what is fixed.

In:   a base model and a `ShareSpec`.
Out:  the adapted model; its matrices by role; arrays to send, arrays to keep, arrays put back.
Who:  whoever makes participants calls `adapt`; client and server call the rest.

A key is the path of the adapted layer and the role, `encoder.layer.0.query.B`, the same for every adapter library.
Initial values come from (seed, key) or (seed, client, key), see `seeds`, not from how the model was built.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..modules.init import lora_scaling
from .heterogeneous import HetALoRALinear
from .seeds import kaiming, seed_of
from .share_specs import LayerShape, Lives, ShareSpec
from .wire import LEFT, RIGHT, WireSpec

ROLE_OF = {
    "lora": re.compile(r"(.+)\.lora_(A|B)\.default\.weight"),
    "vera": re.compile(r"(.+)\.vera_lambda_(d|b)\.default"),
    "alora": re.compile(r"(.+)\.asymlora_(A|B)\.default\.weight"),
    "het": re.compile(r"(.+)\.lora_(A|M|B1|B2|B)"),
}
PREFIX = "base_model.model."  # what PEFT puts before every name


class Matrix(NamedTuple):
    """One tensor that the method speaks of."""

    role: str
    tensor: Tensor


def target_names(base: nn.Module, target_modules: str | Sequence[str], heads: Sequence[str]) -> list[str]:
    """Names of the linear layers to adapt.

    Args:
        base: the model.
        target_modules: "all-linear", a regular expression for whole names, or a list of last parts of names.
        heads: modules that are trained in full and never adapted.

    Raises:
        ValueError: nothing matches; the message lists last parts that would.
    """
    output = getattr(base, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not output and not _in_heads(name, heads)
    ]
    if target_modules == "all-linear":
        chosen = linear
    elif isinstance(target_modules, str):
        chosen = [name for name in linear if re.fullmatch(target_modules, name)]
    else:
        chosen = [name for name in linear if any(name == t or name.endswith(f".{t}") for t in target_modules)]
    if not chosen:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"target_modules {target_modules!r} match no linear layer; their names end in {ends}")
    return chosen


def _in_heads(name: str, heads: Sequence[str]) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def adapt(
    base: nn.Module,
    spec: ShareSpec,
    *,
    rank: int = 8,
    lora_alpha: float | None = None,
    target_modules: str | Sequence[str] = "all-linear",
    d_m: int = 16,
    heads: Sequence[str] = (),
    seed: int = 0,
    client: str = "",
) -> nn.Module:
    """Put a method's adapter on a base model; everything else but the heads is frozen.

    Args:
        base: the model; changed in place, and its weights are shared with the result.
        spec: the method.
        rank: this client's rank.
        lora_alpha: numerator of the scaling; defaults to 2 rank.
        target_modules: "all-linear", a regular expression for whole names, or a list of last parts of names.
        d_m: rank of the shared space, for unequal ranks.
        heads: names of modules that are trained in full.
        seed: common seed.
        client: its name, for what each client draws on its own.

    Returns:
        The adapted model in evaluation mode; call it as the base.

    Raises:
        ValueError: no such target, no such head.
    """
    names = target_names(base, target_modules, heads)
    trained = [p for name, p in base.named_parameters() if _in_heads(name, heads)]
    missing = [head for head in heads if not any(_in_heads(name, [head]) for name, _ in base.named_parameters())]
    if missing:
        children = ", ".join(name for name, _ in base.named_children())
        raise ValueError(f"heads: no parameters under {', '.join(missing)}; the model has {children}")
    base.requires_grad_(False)
    model = _build(base, spec, names, rank, lora_alpha or 2 * rank, d_m, seed)
    for parameter in trained:
        parameter.requires_grad_(True)
    begin(model, spec, seed, client)
    return model.eval()


def _build(
    base: nn.Module, spec: ShareSpec, names: list[str], rank: int, lora_alpha: float, d_m: int, seed: int
) -> nn.Module:
    """The base with empty adapters on the named layers."""
    if spec.adapter == "het":
        for name in names:
            layer = HetALoRALinear(base.get_submodule(name), rank, d_m, lora_scaling(lora_alpha, rank, False))  # type: ignore[arg-type]
            base.set_submodule(name, layer)
        return base
    from peft import LoraConfig, VeraConfig, get_peft_model

    from ..tuner import ALoRAConfig
    from ..tuner.accelerate import accelerate

    put_on: Any = get_peft_model  # its annotations know transformers' models only
    exactly = "|".join(map(re.escape, names))
    if spec.adapter == "vera":
        return put_on(base, VeraConfig(r=rank, target_modules=exactly, projection_prng_key=seed))
    if spec.adapter == "alora":
        return put_on(base, ALoRAConfig(r=rank, lora_alpha=lora_alpha, tasks=["client"], target_modules=exactly))
    alpha: Any = lora_alpha  # PEFT divides by the rank, so a fraction will do
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=exactly, use_rslora=spec.rslora)
    model: nn.Module = put_on(base, lora)
    accelerate(model)
    return model


def matrices(model: nn.Module, spec: ShareSpec) -> dict[str, Matrix]:
    """Every tensor the method speaks of, by key: the adapter's matrices and the trained heads, keys sorted."""
    found: dict[str, Matrix] = {}
    pattern = ROLE_OF[spec.adapter]
    for name, tensor in _tensors(model):
        match = pattern.fullmatch(name.removeprefix(PREFIX))
        if match:
            found[f"{match[1]}.{match[2]}"] = Matrix(match[2], tensor)
        elif tensor.requires_grad:
            found[name.removeprefix(PREFIX)] = Matrix("head", tensor)
    return dict(sorted(found.items()))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def begin(model: nn.Module, spec: ShareSpec, seed: int, client: str) -> None:
    """Give matrices their first values, and say which of them the optimiser sees.

    Args:
        model: an adapted model.
        spec: its method.
        seed: common seed.
        client: the client's name.
    """
    for key, (role, tensor) in matrices(model, spec).items():
        rule = spec.roles[role]
        if rule.begins == "kaiming":
            words = (client, key) if rule.seed == "client" else (key,)
            tensor.copy_(torch.from_numpy(kaiming(tuple(tensor.shape), seed_of(seed, *words))))
        elif rule.begins == "zeros":
            tensor.zero_()
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(rule.trained)


def arrays_of(model: nn.Module, spec: ShareSpec, lives: Lives) -> dict[str, NDArray]:
    """Values of the matrices that live there, as they are; those that restart each round are left out."""
    return {
        key: _to_numpy(tensor)
        for key, (role, tensor) in matrices(model, spec).items()
        if spec.roles[role].lives == lives and not spec.roles[role].restarts
    }


def untrained(model: nn.Module, spec: ShareSpec) -> dict[str, NDArray]:
    """Values of the matrices that local training must leave as they are."""
    return {k: _to_numpy(t) for k, (role, t) in matrices(model, spec).items() if not spec.roles[role].trained}


def _to_numpy(tensor: Tensor) -> NDArray:
    wide = tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32))  # NumPy has no bf16
    return np.array(wide.numpy(), copy=True)


@torch.no_grad()
def put(model: nn.Module, spec: ShareSpec, arrays: Mapping[str, NDArray | Tensor]) -> None:
    """Copy values into the matrices of these keys.

    Raises:
        ValueError: a key the model does not have, or another shape.
    """
    own = matrices(model, spec)
    for key, values in arrays.items():
        if key not in own:
            raise ValueError(f"the model has no {key}; it has {', '.join(list(own)[:3])}, ...")
        if tuple(values.shape) != tuple(own[key].tensor.shape):
            raise ValueError(f"{key} has shape {tuple(own[key].tensor.shape)} here, got {tuple(values.shape)}")
        own[key].tensor.copy_(torch.as_tensor(values))


@torch.no_grad()
def restart(model: nn.Module, spec: ShareSpec) -> None:
    """Zero what begins anew each round."""
    for role, tensor in matrices(model, spec).values():
        if spec.roles[role].restarts:
            tensor.zero_()


def to_share(model: nn.Module, spec: ShareSpec, *, factors: bool = False) -> dict[str, NDArray]:
    """What a client returns after local training.

    Formula: the shared matrices; for unequal ranks `B + B2 B1`, or B2 and B1 themselves where that is fewer floats.

    Args:
        model: the trained model.
        spec: its method.
        factors: whether factors may be sent (not if something on the way compares keys with those sent down).

    Returns:
        key -> array; factors under `<key>.left` and `<key>.right`.
    """
    if spec.adapter != "het":
        return arrays_of(model, spec, "shared")
    shared: dict[str, NDArray] = {}
    for key, values in arrays_of(model, spec, "shared").items():
        layer = model.get_submodule(key.rpartition(".")[0])
        if not isinstance(layer, HetALoRALinear):
            shared[key] = values  # a shared head
        elif factors and layer.lora_B1.numel() + layer.lora_B2.numel() < values.size:
            shared[key + LEFT], shared[key + RIGHT] = _to_numpy(layer.lora_B2), _to_numpy(layer.lora_B1)
        else:
            shared[key] = _to_numpy(layer.merged_b())
    return shared


def wire_spec(
    model: nn.Module, spec: ShareSpec, *, base: str, scaling: float, seed: int, metrics: Sequence[str]
) -> WireSpec:
    """What this model and the other side must agree on."""
    arrays = {key: (str(a.dtype), tuple(a.shape)) for key, a in arrays_of(model, spec, "shared").items()}
    return WireSpec(spec.name, arrays, base, scaling, seed, tuple(metrics))


def layer_shapes(model: nn.Module, spec: ShareSpec) -> list[LayerShape]:
    """(in_features, out_features) of every adapted layer."""
    paths = {key.rpartition(".")[0] for key, m in matrices(model, spec).items() if m.role != "head"}
    modules: dict[str, Any] = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
    bases = [getattr(modules[path], "base_layer", modules[path]) for path in sorted(paths)]
    return [LayerShape(layer.in_features, layer.out_features) for layer in bases]


def fingerprint(base: nn.Module, *, heads: Sequence[str] = (), data: bool = False) -> str:
    """A hash of a base model, before it is adapted.

    Args:
        base: the model.
        heads: modules left out, because clients may differ in them.
        data: hash the values of the weights too, in their own dtype; reads the whole model.

    Returns:
        SHA-256 over names and shapes, in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base.named_parameters()):
        if _in_heads(name, heads):
            continue
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if data:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
