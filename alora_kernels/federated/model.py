"""From a base model to a client's model, and from its parameters to what travels, what stays and what is fixed.

Whoever makes participants calls `adapt`; client and server read and write the adapted model's matrices by key: the
path of the adapted layer and the role, `encoder.layer.0.query.B`, the same for every adapter library.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..modules.adapter import lora_scaling
from ..ops import alora_linear
from ..routing import ConstantRouting
from .config import FedConfig
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


def _target_names(base: nn.Module, target_modules: str | Sequence[str], heads: Sequence[str]) -> list[str]:
    """Names of the linear layers to adapt, as `adapt` says; heads and the output embeddings are not among them."""
    output = getattr(base, "get_output_embeddings", lambda: None)()
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not output and not _in_heads(name, heads)
    ]
    pattern = (
        target_modules if isinstance(target_modules, str) else f"(.*[.])?({'|'.join(map(re.escape, target_modules))})"
    )
    chosen = linear if pattern == "all-linear" else [name for name in linear if re.fullmatch(pattern, name)]
    if not chosen:
        ends = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"target_modules {target_modules!r} match no linear layer; their names end in {ends}")
    return chosen


def _in_heads(name: str, heads: Sequence[str]) -> bool:
    return f"{name}.".startswith(tuple(f"{head}." for head in heads))


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
    """Put a method's adapter on a base model, in place; everything else but the heads is frozen.

    Args:
        rank: this client's rank.
        lora_alpha: numerator of the scaling; defaults to 2 rank.
        target_modules: "all-linear", a regular expression for whole names, or a list of last parts of names.
        d_m: rank of the shared space, for unequal ranks.
        heads: names of modules that are trained in full.
        seed, client: common to all; its name, for what each client draws on its own.

    Returns:
        The adapted model in evaluation mode, to be called as the base, whose weights it shares.

    Raises:
        ValueError: no such target, no such head.
    """
    names = _target_names(base, target_modules, heads)
    trained = [p for name, p in base.named_parameters() if _in_heads(name, heads)]
    if missing := [head for head in heads if not any(_in_heads(name, [head]) for name, _ in base.named_parameters())]:
        children = ", ".join(name for name, _ in base.named_children())
        raise ValueError(f"heads: no parameters under {', '.join(missing)}; the model has {children}")
    base.requires_grad_(False)
    model = _build(base, spec, names, rank, lora_alpha or 2 * rank, d_m, seed)
    for parameter in trained:
        parameter.requires_grad_(True)
    for key, (role, tensor) in matrices(model, spec).items():
        rule = spec.roles[role]
        if rule.begins == "kaiming":  # not from how the model was built: the same on every machine, under every engine
            words = (client, key) if rule.lives == "private" else (key,)
            tensor.data.copy_(torch.from_numpy(kaiming(tuple(tensor.shape), seed_of(seed, *words))))
        elif rule.begins == "zeros":
            tensor.data.zero_()
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(rule.lives != "frozen")
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
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        name = name.removeprefix(PREFIX)
        match = ROLE_OF[spec.adapter].fullmatch(name)
        if match:
            found[f"{match[1]}.{match[2]}"] = Matrix(match[2], tensor)
        elif tensor.requires_grad:
            found[name] = Matrix("head", tensor)
    return dict(sorted(found.items()))


def values(model: nn.Module, spec: ShareSpec, *lives: Lives) -> dict[str, Tensor]:
    """Copies of the matrices that live there, on the CPU; those that restart each round are left out."""
    return {
        key: _copy(tensor)
        for key, (role, tensor) in matrices(model, spec).items()
        if spec.roles[role].lives in lives and not spec.roles[role].restarts
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32), copy=True)  # NumPy has no bf16


@torch.no_grad()
def put(model: nn.Module, spec: ShareSpec, arrays: Mapping[str, NDArray | Tensor]) -> None:
    """Copy values into the matrices of these keys, which must fit the model, and zero what begins anew each round."""
    own = matrices(model, spec)
    for key, values in arrays.items():
        if key not in own:
            raise ValueError(f"the model has no {key}; it has {', '.join(list(own)[:3])}, ...")
        if tuple(values.shape) != tuple(own[key].tensor.shape):
            raise ValueError(f"{key} has shape {tuple(own[key].tensor.shape)} here, got {tuple(values.shape)}")
        own[key].tensor.copy_(torch.as_tensor(values))
    for role, tensor in own.values():
        if spec.roles[role].restarts:
            tensor.zero_()


def to_share(model: nn.Module, spec: ShareSpec, *, factors: bool = False) -> dict[str, Tensor]:
    """What a client returns after local training: the shared matrices, for unequal ranks `B + B2 B1`.

    With `factors`, B2 and B1 themselves where that is fewer floats, as `<key>.left` and `<key>.right`; not if something
    on the way compares keys.
    """
    shared = values(model, spec, "shared")
    for path, layer in model.named_modules():
        if not isinstance(layer, HetALoRALinear):
            continue
        key = f"{path}.B"
        if factors and layer.lora_B1.numel() + layer.lora_B2.numel() < shared[key].numel():
            del shared[key]
            shared[key + LEFT], shared[key + RIGHT] = _copy(layer.lora_B2), _copy(layer.lora_B1)
        else:
            shared[key] = _copy(layer.merged_b())
    return shared


def agreement(model: nn.Module, config: FedConfig, base: str) -> WireSpec:
    """What both sides must agree on, of an adapted model and the fingerprint of its base."""
    arrays = {
        key: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in values(model, config.spec, "shared").items()
    }
    return WireSpec(config.method, arrays, base, config.scaling, config.seed, config.metrics)


def layer_shapes(model: nn.Module, spec: ShareSpec) -> list[LayerShape]:
    """(in_features, out_features) of every adapted layer."""
    paths = {key.rpartition(".")[0] for key, m in matrices(model, spec).items() if m.role != "head"}
    modules: dict[str, Any] = {name.removeprefix(PREFIX): module for name, module in model.named_modules()}
    bases = [modules[path].base_layer for path in sorted(paths)]
    return [LayerShape(layer.in_features, layer.out_features) for layer in bases]


def fingerprint(base: nn.Module, *, heads: Sequence[str] = (), data: bool = False) -> str:
    """SHA-256 over the names and shapes of a base model's weights, in hexadecimal, before it is adapted.

    `heads` are left out, because clients may differ in them. `data` hashes values too, in their own dtype: it reads
    them.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(base.named_parameters()):
        if _in_heads(name, heads):
            continue
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if data:
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class HetALoRALinear(nn.Module):
    """A frozen linear layer with a low-rank path of the client's own rank r, whose shared part has one shape for all.

    Formula: `y = x W0^T + bias + s (M A x) (B + B2 B1)^T`: the fused op with A := M A and B := B + B2 B1. A client
    teaches the others B2 B1; the server's mean replaces B, and B2 begins at zero again. d_m is the rank of the shared
    space, s is alpha / r in the paper; weight and bias of the base are frozen and shared, not copied. The buffer
    `lora_B` is what all clients have learned so far; all else is private.

    Source: Ban & Ji 2025, Fed-ALoRA with unequal ranks.
    """

    def __init__(self, base_layer: nn.Linear, r: int, d_m: int, scaling: float) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.d_m, self.scaling = r, d_m, scaling
        weight = base_layer.weight
        dtype = weight.dtype if weight.dtype.itemsize >= 4 else torch.float32  # adapters train in 32 bits or more

        def zeros(rows: int, columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=dtype, device=weight.device)

        self.lora_A = nn.Parameter(zeros(r, base_layer.in_features))
        self.lora_M = nn.Parameter(zeros(d_m, r))
        self.lora_B1 = nn.Parameter(zeros(r, d_m))
        self.lora_B2 = nn.Parameter(zeros(base_layer.out_features, r))
        self.register_buffer("lora_B", zeros(base_layer.out_features, d_m))

    def merged_b(self) -> Tensor:
        """B + B2 B1, `[N, d_m]`: what this client would have everybody use."""
        return torch.addmm(cast(Tensor, self.lora_B), self.lora_B2, self.lora_B1)

    def forward(self, x: Tensor) -> Tensor:
        """y `[..., N]` from x `[..., K]`."""
        return alora_linear(
            x,
            self.base_layer.weight,
            (self.lora_M @ self.lora_A)[None],
            self.merged_b(),
            bias=self.base_layer.bias,
            task_ids=ConstantRouting(0),
            scaling=self.scaling,
        )

    def extra_repr(self) -> str:
        """The arguments that tell one layer from another."""
        return f"r={self.r}, d_m={self.d_m}, scaling={self.scaling:g}"


def seed_of(seed: int, *words: object) -> int:
    """A 63-bit seed from the run's seed and any words."""
    digest = hashlib.sha256("\x1f".join([str(seed), *map(str, words)]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def kaiming(shape: tuple[int, ...], seed: int) -> NDArray[np.float64]:
    """Uniform in +-1/sqrt(fan_in), as LoRA draws A (Kaiming with a = sqrt 5), fan_in the last dimension."""
    bound = 1 / math.sqrt(shape[-1]) if shape[-1] else 0.0
    return np.random.default_rng(seed).uniform(-bound, bound, shape)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Python's and NumPy's generators are after the block as they were before it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators seeded inside, and as they were outside."""
    with generators_kept(), torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
