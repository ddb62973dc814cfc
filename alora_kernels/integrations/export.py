"""`export_lora`: each task of an ALoRA adapter as a stock LoRA folder, for servers that know only LoRA.

In:   an adapter folder, or a PEFT model that holds the adapter; the base model is not loaded.
Out:  `folder/<task>/` with `adapter_config.json` and `adapter_model.safetensors`; a report with the servers' commands.
Who:  users and `alora export`.

The shared B is written into every folder, so n tasks cost n B on the disk and in the server: the price of leaving.
vLLM and SGLang read one rank per adapter, no patterns: s goes into B, lora_alpha = R, and smaller modules are filled
with zeros up to R, which changes no output.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .lora_folder import check_replaceable, target_names, write_lora
from .peft.config import ALoRAConfig
from .peft.files import CONFIG, WEIGHTS

KEY = re.compile(r"base_model\.model\.(.+)\.asymlora_(A|B|router)")
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # as a folder and in `name=path` of the servers
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # all that vLLM's --max-lora-rank takes (0.26)
NO_BASE = "BASE_MODEL"

CARD = """---
library_name: peft
base_model: {base}
tags: [lora]
---

# {name}

A stock LoRA adapter of rank {rank}: task `{task}` of an asymmetric LoRA (ALoRA) adapter with one B for all its tasks.
Every module of every task that was exported with it holds the same B. The scaling is part of B.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/folder")
```
"""


@dataclass(frozen=True)
class ExportedTask:
    """One folder.

    Attributes:
        name: of the folder, and of the model for clients of a server.
        task: what the ALoRA adapter calls it.
        folder: absolute path.
        bytes: size of the weights.
    """

    name: str
    task: str
    folder: Path
    bytes: int


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how to serve it.

    Attributes:
        base: name of the base model, or None if the adapter does not say.
        rank: R of every folder.
        modules: adapted modules per folder.
        tasks: the folders.
    """

    base: str | None
    rank: int
    modules: int
    tasks: tuple[ExportedTask, ...]

    @property
    def vllm_rank(self) -> int | None:
        """The smallest --max-lora-rank that vLLM takes and that holds R; None above 512."""
        return next((r for r in VLLM_RANKS if r >= self.rank), None)

    @property
    def vllm_command(self) -> str | None:
        """What starts vLLM with all tasks; None for a rank that it does not serve."""
        if self.vllm_rank is None:
            return None
        start = ["vllm", "serve", self.base or NO_BASE]
        options = ["--enable-lora", "--max-loras", str(len(self.tasks)), "--max-lora-rank", str(self.vllm_rank)]
        return self._command(start, options, "--lora-modules")

    @property
    def sglang_command(self) -> str:
        """What starts SGLang with all tasks."""
        start = ["python", "-m", "sglang.launch_server", "--model-path", self.base or NO_BASE]
        options = ["--enable-lora", "--max-loras-per-batch", str(len(self.tasks)), "--max-lora-rank", str(self.rank)]
        return self._command(start, options, "--lora-paths")

    def _command(self, start: Sequence[str], options: Sequence[str], folders: str) -> str:
        pairs = [shlex.quote(f"{task.name}={task.folder}") for task in self.tasks]
        return " \\\n    ".join([shlex.join(start), shlex.join([*options, folders]), *pairs])

    def table(self) -> list[tuple[str, str, int, int]]:
        """(name, folder, rank, bytes) of each task."""
        return [(task.name, str(task.folder), self.rank, task.bytes) for task in self.tasks]


class _Module(NamedTuple):
    """One module of the adapter, for all tasks: A `[E, R, K]`, B `[N, R]`, s."""

    a: Tensor
    b: Tensor
    s: float


def export_lora(
    source: str | Path | PeftModel,
    folder: str | Path,
    *,
    tasks: Sequence[str] | Mapping[str, str] | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write each task of an ALoRA adapter as a stock PEFT LoRA folder.

    Formula: A = A_task, B = s B_shared, alpha = R, so that (alpha / R) B A is the task's change of the weight.

    Args:
        source: an adapter folder, or a PEFT model whose one active adapter is ALoRA.
        folder: gets one subfolder per task.
        tasks: which ones; a mapping gives them other names: `{"movie reviews": "movie"}`. None: all.
        rank: R of every folder, at least the adapter's largest; None is the largest.
        dtype: of the files; None keeps the adapter's.
        overwrite: replace adapters that are there.

    Returns:
        Sizes, and the commands that serve the folders with vLLM and SGLang.

    Raises:
        ValueError: soft routing, modules or biases trained in full, unknown or unsafe names, a rank that is too small,
            folders that hold something, a damaged adapter. Nothing is written then.

    Example:
        >>> print(export_lora("runs/demo/adapter", "exported").vllm_command)

    Source: Hu et al. 2021, LoRA; Ban & Ji 2025, ALoRA.
    """
    config, tensors = _from_model(source) if isinstance(source, PeftModel) else _from_folder(Path(source))
    _check_fixed(config)
    modules = _modules(config, tensors)
    names = _folder_names(tasks, list(config.tasks))
    r = max(module.b.shape[1] for module in modules.values())
    if rank is not None and rank < r:
        raise ValueError(f"rank must be at least {r}, the adapter's largest, got {rank}: no task fits into less")
    r = rank or r
    out = Path(folder).resolve()
    for name in names.values():
        check_replaceable(out / name, overwrite)
    wide = {name: _filled(module, r, dtype, name) for name, module in modules.items()}
    stock, base = _stock_config(config, list(modules), r), config.base_model_name_or_path or None
    written = []
    for task, name in names.items():
        e = config.tasks.index(task)
        card = CARD.format(base=base or NO_BASE, name=name, rank=r, task=task)
        size = write_lora(out / name, {m: (a[e], b) for m, (a, b) in wide.items()}, stock, card)
        written.append(ExportedTask(name, task, out / name, size))
    return ExportReport(base, r, len(modules), tuple(written))


def _from_folder(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Config and tensors of an adapter folder."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}: give an adapter folder that alora_kernels.save_adapter wrote")
    try:
        config = ALoRAConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error!r}") from None
    if not isinstance(config, ALoRAConfig):
        raise ValueError(
            f"{folder} is an adapter of type {config.peft_type.value}, not ALoRA: there is nothing to export"
        )
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}: save the adapter again")
    try:
        return config, load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from None


def _from_model(model: PeftModel) -> tuple[Any, dict[str, Tensor]]:
    """Config and tensors of the one active adapter of a model."""
    configs: Any = model.peft_config
    active = [name for name in model.active_adapters if isinstance(configs[name], ALoRAConfig)]
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active ALoRA adapters and one can be exported at a time: choose it with"
            " model.set_adapter(name)"
        )
    state = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=False)
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("parts of the adapter are offloaded to meta tensors: export its saved folder instead")
    return configs[active[0]], {key: tensor.detach().cpu() for key, tensor in state.items()}


def _check_fixed(config: Any) -> None:
    """Raise unless every task is one fixed LoRA."""
    if config.routing == "soft":
        raise ValueError(
            "the adapter routes softly: each token weighs its experts anew, so no fixed LoRA equals it and it cannot be"
            " exported; serve it with this package"
        )
    if config.modules_to_save:
        trained = ", ".join(sorted(set(config.modules_to_save)))
        raise ValueError(
            f"the adapter trained {trained} in full (modules_to_save), which LoRA servers do not load: train without"
            " modules_to_save, or serve it with this package"
        )
    if config.bias != "none":
        raise ValueError(f"the adapter trained biases (bias={config.bias!r}), which LoRA servers do not load")


def _modules(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, _Module]:
    """Matrices by module, checked against the config."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"the adapter holds {key}, which no LoRA has: it cannot be exported")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds numbers that are not finite: the adapter is broken")
        parts.setdefault(match[1], {})[match[2]] = tensor
    if not parts:
        raise ValueError("the adapter holds no adapted module")
    modules = {}
    for name, part in sorted(parts.items()):
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha)
        a, b = part.get("A"), part.get("B")
        if len(part) != 2 or a is None or b is None or a.shape[:2] != (len(config.tasks), r) or b.shape[1:] != (r,):
            shapes = {kind: tuple(tensor.shape) for kind, tensor in part.items()}
            raise ValueError(
                f"{name} has matrices of shapes {shapes}, which do not fit {len(config.tasks)} tasks of rank {r}:"
                f" {CONFIG} and {WEIGHTS} do not belong together"
            )
        modules[name] = _Module(a, b, config.scaling(r, alpha))
    return modules


def _folder_names(tasks: Sequence[str] | Mapping[str, str] | None, known: Sequence[str]) -> dict[str, str]:
    """Task -> folder name, for the tasks asked for."""
    if isinstance(tasks, str):
        raise ValueError(f"tasks must be a list of names or a mapping, got the string {tasks!r}: use [{tasks!r}]")
    names = dict(tasks) if isinstance(tasks, Mapping) else {t: t for t in (known if tasks is None else tasks)}
    unknown = [task for task in names if task not in known]
    if unknown or not names:
        raise ValueError(f"unknown tasks {', '.join(map(repr, unknown)) or '(none given)'}: the adapter has"
                         f" {', '.join(known)}")  # fmt: skip
    for task, name in names.items():
        if not SAFE.fullmatch(name):
            raise ValueError(
                f"{name!r} cannot name a folder (letters, digits, '.', '_' and '-', at most 64): give another name, as"
                f" in tasks={{{task!r}: 'name'}}, or --task {task!r}=name on the command line"
            )
    lowered = [name.lower() for name in names.values()]  # some file systems do not tell A from a
    if len(set(lowered)) < len(lowered):
        twice = next(name for name in lowered if lowered.count(name) > 1)
        raise ValueError(f"two tasks would be written to the folder {twice!r}: give one of them another name")
    return names


def _filled(module: _Module, r: int, dtype: torch.dtype | None, name: str) -> tuple[Tensor, Tensor]:
    """A `[E, R, K]` and s B `[N, R]`, zeros beyond the module's own rank, rounded once."""
    own = module.b.shape[1]
    a = torch.nn.functional.pad(module.a, (0, 0, 0, r - own)).to(dtype or module.a.dtype)
    b = torch.nn.functional.pad(module.b.double() * module.s, (0, r - own)).to(dtype or module.b.dtype)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise ValueError(f"{name}: numbers too large for {a.dtype}: export in float32")
    return a, b


def _stock_config(config: Any, modules: Sequence[str], r: int) -> LoraConfig:
    stock = LoraConfig(
        r=r,
        lora_alpha=r,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    stock.target_modules = target_names([config], modules)  # set later: PEFT would make it a set, in no fixed order
    return stock
