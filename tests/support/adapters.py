"""Adapter folders for tests: saved the way users save theirs, or written from chosen numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alora_kernels.adapters.writer import save_adapter
from alora_kernels.data import load_model
from alora_kernels.tuner import ALoRAConfig, ALoRALayer

from . import tiny

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Matrices = Mapping[str, Tensor]  # by module


def tiny_base() -> tuple[Any, Any]:
    """A two-layer random causal model and its tokenizer, always the same numbers."""
    return load_model("tiny-random")


def alora_folder(
    path: Path,
    base: nn.Module,
    tasks: Sequence[str],
    *,
    r: int = 4,
    seed: int = 0,
    seed_b: int | None = None,
    dtype: torch.dtype = torch.float32,
    base_name: str | None = "tiny-random",
    target_modules: Any = "all-linear",
    **settings: Any,
) -> Path:
    """Save an ALoRA adapter whose A and B are random and not zero; `base` stays as it is.

    Args:
        path: the adapter's folder, made here.
        base: any model without adapters.
        tasks: their names.
        r: rank.
        seed: of A; the same seed and shapes give the same numbers.
        seed_b: of B; None takes `seed`. Folders with one B and different A serve from one store.
        dtype: of the saved tensors.
        base_name: what the config says the base was; None says nothing.
        target_modules: as in PEFT.
        settings: more of `ALoRAConfig`.
    """
    config = ALoRAConfig(
        r=r, tasks=list(tasks), target_modules=target_modules, **({"task_type": "CAUSAL_LM"} | settings)
    )
    model = get_peft_model(deepcopy(base), config)
    fill(model, seed, seed if seed_b is None else seed_b, dtype)
    model.peft_config["default"].base_model_name_or_path = base_name
    save_adapter(model, path, save_embedding_layers=False)  # no look at the hub for the base
    return path


def lora_folder(
    path: Path, base: nn.Module, *, seed: int = 0, base_name: str | None = "tiny-random", **settings: Any
) -> Path:
    """Save a stock PEFT LoRA adapter whose A and B are random; `base` stays as it is."""
    given = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(deepcopy(base), LoraConfig(**given))
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(path, save_embedding_layers=False)
    return path


@torch.no_grad()
def fill(model: nn.Module, seed: int, seed_b: int, dtype: torch.dtype = torch.float32) -> None:
    """Random A (standard deviation 1 / sqrt K, every task its own) and B (0.1 / sqrt R) in all adapted layers."""
    a_numbers, b_numbers = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed_b)
    for layer in (module for module in model.modules() if isinstance(module, ALoRALayer)):
        for parameters, scale, numbers in (
            (layer.asymlora_A, layer.in_features**-0.5, a_numbers),
            (layer.asymlora_B, 0.1, b_numbers),
        ):
            for old in parameters.values():
                new = torch.randn(old.weight.shape, generator=numbers) * scale
                old.weight = nn.Parameter(new.to(dtype), requires_grad=False)


class Mlp(tiny.Mlp):
    """As there, but torch's generator is left alone."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            super().__init__()


#: settings of `alora_folder` and `lora_folder` for `Mlp`, which is no causal model
MLP: dict[str, Any] = {"target_modules": ["up", "down"], "task_type": None}


def half_written(tensors: Any, path: Any, **kwargs: Any) -> None:
    """In the place of safetensors' `save_file`: a write that is interrupted."""
    Path(path).write_bytes(b"half of it")
    raise KeyboardInterrupt


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the folder's weights after `change` had its way with them."""
    path = folder / WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder: Path, **settings: Any) -> None:
    """Overwrite settings of the folder's config."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def alora(path: Path, tasks: Sequence[str], a: Matrices, b: Matrices, base: str = "tiny") -> Path:
    """An ALoRA adapter of module -> A `[E, R, K]` and B `[N, R]`; alpha = r, so s = 1."""
    tensors = {f"{PREFIX}{m}.asymlora_A.weight": t for m, t in a.items()} | {
        f"{PREFIX}{m}.asymlora_B.weight": t for m, t in b.items()
    }
    r = next(iter(b.values())).shape[1]
    return written(path, tensors, peft_type="ASYMLORA", tasks=list(tasks), r=r, lora_alpha=r, base=base)


def lora(path: Path, a: Matrices, b: Matrices, base: str | None = "tiny", s: float = 1) -> Path:
    """A stock LoRA of module -> A `[R, K]` and B `[N, R]`."""
    tensors = {f"{PREFIX}{m}.lora_A.weight": t for m, t in a.items()} | {
        f"{PREFIX}{m}.lora_B.weight": t for m, t in b.items()
    }
    r = next(iter(b.values())).shape[1]
    return written(path, tensors, peft_type="LORA", r=r, lora_alpha=s * r, base=base)


def written(path: Path, tensors: Matrices, *, base: str | None, **settings: object) -> Path:
    """A folder with these tensors and settings, whatever they mean."""
    path.mkdir(parents=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path / WEIGHTS,
              metadata={"format": "pt"})  # fmt: skip
    (path / CONFIG).write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return path
