"""`export_lora`: each task of an ALoRA adapter as a stock LoRA folder, for servers that know only LoRA.

The base model is not loaded. The shared B is written into every folder: n tasks cost n B on the disk and in the server.
vLLM before 0.32 and SGLang read one rank per adapter. So that all of them answer alike, s goes into B, lora_alpha = R,
and smaller modules are filled with zeros, which changes no output.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedConfig

from ..dtypes import DTYPE_NAMES
from ..text import NAME, listed
from ..tuner import ALoRAConfig, ALoRALayer
from ..tuner.card import hub_id, told
from ..tuner.config import PREFIX, unwrapped
from ..tuner.experts import PARAMETERS, StackedWeight
from .cards import TaskCard, read_task_cards, write_task_cards
from .config import AdapterConfig, checked_config, refused
from .reader import read_adapter
from .writer import check_replaceable, target_names, write_adapter

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # all that vLLM's --max-lora-rank takes (0.32)
NO_BASE = "BASE_MODEL"

CARD = """---
library_name: peft
{metadata}tags: [lora]
---

# {name}

A stock LoRA adapter of rank {rank} for {base}: task `{task}` of an asymmetric LoRA (ALoRA) adapter.
Every module of every task that was exported with it holds the same B. The scaling is part of B.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/folder")
```
"""


@dataclass(frozen=True)
class ExportedTask:
    """One folder."""

    name: str  # of the folder, and of the model for clients of a server
    task: str  # what the ALoRA adapter calls it
    folder: Path
    bytes: int  # of the weights


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how to serve it."""

    base: str | None  # the model's name, if the adapter says it
    rank: int  # of every folder, as are the adapted modules
    modules: int
    tasks: tuple[ExportedTask, ...]
    dtype: str | None = None  # of the base, where that is on this machine
    experts: bool = False  # whether weights of a mixture's experts are among the modules

    @property
    def vllm_rank(self) -> int | None:
        """The smallest --max-lora-rank that vLLM takes and that holds R; None above 512."""
        return next((r for r in VLLM_RANKS if r >= self.rank), None)

    @property
    def vllm_command(self) -> str | None:
        """What starts vLLM with all tasks; None for a rank that it does not serve, or adapters of experts."""
        if self.vllm_rank is None or self.experts:
            return None
        return self._command("vllm serve", "--max-loras", self.vllm_rank, "--lora-modules")

    @property
    def sglang_command(self) -> str | None:
        """What starts SGLang with all tasks; None for adapters of experts, which was not tried."""
        if self.experts:
            return None
        start = "python -m sglang.launch_server --model-path"
        return self._command(start, "--max-loras-per-batch", self.rank, "--lora-paths")

    def _command(self, start: str, slots: str, rank: int, folders: str) -> str:
        """Both servers make 16 bits of a float32 checkpoint unless they are told its dtype.

        One slot more than there are tasks: SGLang counts the base alone as one more of a batch; with all slots taken,
        vLLM 0.32 gives rows of the base the last slot's adapter on CPUs.
        """
        base = [self.base or NO_BASE, *(["--dtype", self.dtype] if self.dtype else [])]
        options = f"--enable-lora {slots} {len(self.tasks) + 1} --max-lora-rank {rank} {folders}"
        pairs = [shlex.quote(f"{task.name}={task.folder}") for task in self.tasks]
        return " \\\n    ".join([f"{start} {shlex.join(base)}", options, *pairs])

    def table(self) -> list[tuple[str, str, int, int]]:
        """(name, folder, rank, bytes) of each task."""
        return [(task.name, str(task.folder), self.rank, task.bytes) for task in self.tasks]


class _Source(NamedTuple):
    """An adapter, saved or in memory."""

    config: AdapterConfig
    scaling: dict[str, float]  # module -> s
    b: dict[str, Tensor]  # module -> B [N, R], of experts that do not share it [X, N, R]
    matrices: Callable[[str], dict[str, Tensor]]  # task -> module -> A [R, K], or [X, R, K]
    cards: dict[str, TaskCard]  # as far as a folder says how its tasks are asked
    dtype: str | None = None  # of a base that is in memory
    experts: Mapping[str, int] = {}  # stacked weight -> X

    def shared(self, r: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """s B with zeros up to R columns, rounded once."""
        scaled = {module: b.double() * self.scaling[module] for module, b in self.b.items()}
        return {m: _cast(m, pad(b, (0, r - b.shape[-1])), dtype or self.b[m].dtype) for m, b in scaled.items()}

    def own(self, task: str, r: int, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """A of one task with zeros up to R rows."""
        own = self.matrices(task)
        return {m: _cast(m, pad(a, (0, 0, 0, r - a.shape[-2])), dtype or a.dtype) for m, a in own.items()}


def export_lora(
    source: str | Path | PeftModel,
    folder: str | Path,
    *,
    tasks: Sequence[str] | Mapping[str, str] | None = None,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write each task of an ALoRA adapter as a stock PEFT LoRA folder; gives sizes and the commands that serve them.

    Formula: A = A_task, B = s B_shared, alpha = R, so that (alpha / R) B A is the task's change of the weight.

    Args:
        source: an adapter folder, or a PEFT model whose one active adapter is ALoRA.
        folder: gets one subfolder per task.
        tasks: which ones; a mapping gives them other names: `{"movie reviews": "movie"}`. None: all.
        rank: R of every folder, at least the adapter's largest; None is the largest.
        dtype: of the files; None keeps the adapter's.
        overwrite: replace adapters that are there.

    Raises:
        ValueError: soft routing, modules or biases trained in full, unknown or unsafe names, a rank that is too small,
            folders that hold something, a damaged adapter. Nothing is written then.

    Example:
        >>> print(export_lora("runs/demo/adapter", "exported").vllm_command)

    Source: Hu et al. 2021, LoRA; Ban & Ji 2025, ALoRA.
    """
    if not isinstance(source, PeftModel):
        source = getattr(source, "_orig_mod", source)  # what torch.compile wrapped
    given = _from_model(source) if isinstance(source, PeftModel) else _from_folder(source)
    names = _folder_names(tasks, given.config.tasks)
    r = max(b.shape[-1] for b in given.b.values())
    if rank is not None and rank < r:
        raise ValueError(f"rank must be at least {r}, the adapter's largest, got {rank}: no task fits into less")
    r = rank or r
    out = Path(folder).resolve()
    for name in names.values():
        check_replaceable(out / name, overwrite)
    shared = given.shared(r, dtype)
    for task in names:  # all of them, before the first is written
        given.own(task, r, dtype)
    places = stock_places(list(shared), given.experts)
    stock, base = _stock_config(given.config, list(shared), r), given.config.base
    metadata = f"base_model: {hub_id(base)}\n" if hub_id(base) else ""
    written = []
    for task, name in names.items():
        card = CARD.format(metadata=metadata, base=told(base), name=name, rank=r, task=task)
        tensors: dict[str, Tensor] = {}
        for module, a in given.own(task, r, dtype).items():
            pair = a, shared[module]
            if module in given.experts:
                pair = as_parameter(*pair, given.experts[module])
            tensors |= {f"{PREFIX}{places[module]}.lora_{p}.weight": t for p, t in zip("AB", pair, strict=True)}
        written.append(ExportedTask(name, task, out / name, write_adapter(out / name, tensors, stock, card)))
        write_task_cards(out / name, {name: given.cards[task]} if task in given.cards else {})
    dtype_of_base = given.dtype or _dtype_of(base)
    return ExportReport(base, r, len(shared), tuple(written), dtype_of_base, bool(given.experts))


def stock_places(modules: Sequence[str], stacks: Collection[str]) -> dict[str, str]:
    """What PEFT calls the layer of each module: around experts it nests a wrapper per parameter, the first inside."""
    places = {module: module for module in modules if module not in stacks}
    for module in stacks:
        path, _, leaf = module.rpartition(".")
        wrapped = leaf == PARAMETERS[0] and f"{path}.{PARAMETERS[1]}" in stacks
        places[module] = f"{path}.base_layer" if wrapped else path
    return places


def as_parameter(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """A `[X R, K]`, expert by expert, and B `[N, R X]`, rank by rank: as PEFT keeps them for X experts."""
    a, b = a.expand(experts, *a.shape[-2:]), b.expand(experts, *b.shape[-2:])
    return a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()


def _from_folder(folder: str | Path) -> _Source:
    file = read_adapter(folder, only="alora")
    file.say_copies()
    cards = read_task_cards(file.folder, file.tasks)
    experts = {
        module: (*file.shapes[module].a, *file.shapes[module].b) for module in file.config.stacks & file.keys.keys()
    }
    if vague := [module for module, found in experts.items() if not found]:
        raise refused(file.folder, f"the experts of {listed(vague, 2)} share A and B, so the folder does not say how"
                      " many they are: export the loaded model")  # fmt: skip
    return _Source(file.config, file.scaling, file.b, file.matrices, cards, None, {m: x[0] for m, x in experts.items()})


def _from_model(model: PeftModel) -> _Source:
    """The one active adapter of a model."""
    configs: Any = model.peft_config
    active = [name for name in model.active_adapters if isinstance(configs[name], ALoRAConfig)]
    if len(active) != 1:
        raise ValueError(
            f"the model has {len(active)} active ALoRA adapters and one can be exported at a time: choose it with"
            " model.set_adapter(name)"
        )
    (name,) = active
    trusted = configs[name].to_dict() | {"rank_pattern": None, "alpha_pattern": None}  # the layers know r and s
    config = checked_config(f"adapter {name!r} of the model", trusted)
    base: Any = model.base_model.model
    layers = {
        unwrapped(module): layer
        for module, layer in sorted(base.named_modules(remove_duplicate=False))
        if isinstance(layer, ALoRALayer) and name in layer.asymlora_spec
    }
    if any(layer.asymlora_B[name].weight.is_meta or layer.asymlora_A[name].weight.is_meta for layer in layers.values()):
        raise ValueError("parts of the adapter are offloaded to meta tensors: export its saved folder instead")
    scaling = {module: layer.asymlora_spec[name].scaling for module, layer in layers.items()}
    b = {module: layer.asymlora_B[name].weight.detach().cpu() for module, layer in layers.items()}

    def matrices(task: str) -> dict[str, Tensor]:
        row = config.tasks.index(task)
        return {module: layer.asymlora_A[name].weight[row].detach().cpu() for module, layer in layers.items()}

    dtype = str(getattr(base, "dtype", None)).removeprefix("torch.")  # a plain module has none
    experts = {module: layer.num_experts for module, layer in layers.items() if isinstance(layer, StackedWeight)}
    return _Source(config, scaling, b, matrices, {}, dtype if dtype in DTYPE_NAMES else None, experts)


def _dtype_of(base: str | None) -> str | None:
    """The dtype in a model's config, in a folder or in the hub's cache; nothing is downloaded."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(base or "", local_files_only=True)
    except (OSError, ValueError):
        return None
    given = config.get("dtype", config.get("torch_dtype"))
    return given if given in DTYPE_NAMES else None


def _folder_names(tasks: Sequence[str] | Mapping[str, str] | None, known: Sequence[str]) -> dict[str, str]:
    """Task -> folder name, for the tasks asked for."""
    if isinstance(tasks, str):
        raise ValueError(f"tasks must be a list of names or a mapping, got the string {tasks!r}: use [{tasks!r}]")
    names = dict(tasks) if isinstance(tasks, Mapping) else {t: t for t in (known if tasks is None else tasks)}
    unknown = [task for task in names if task not in known]
    if unknown or not names:
        raise ValueError(f"unknown task {', '.join(map(repr, unknown)) or '(none given)'}: the adapter has"
                         f" {', '.join(known)}")  # fmt: skip
    for task, name in names.items():
        if not NAME.fullmatch(name):  # as a folder and in `name=path` of the servers
            raise ValueError(
                f"{name!r} cannot name a folder (letters, digits, '.', '_' and '-', at most 64): give another name, as"
                f" in tasks={{{task!r}: 'name'}}, or --task {task!r}=name on the command line"
            )
    lowered = [name.lower() for name in names.values()]  # some file systems do not tell A from a
    if len(set(lowered)) < len(lowered):
        twice = next(name for name in lowered if lowered.count(name) > 1)
        raise ValueError(f"two tasks would be written to the folder {twice!r}: give one of them another name")
    return names


def _cast(module: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        why = "too large for" if torch.isfinite(tensor).all() else "that are not finite, in"
        raise ValueError(f"{module} holds numbers {why} {dtype}: export in float32, or train again with a lower rate")
    return cast


def _stock_config(config: AdapterConfig, modules: Sequence[str], r: int) -> LoraConfig:
    stacks = [module for module in modules if module in config.stacks]
    stock = LoraConfig(
        r=r,
        lora_alpha=r,
        task_type=config.task_type,
        base_model_name_or_path=config.base,
        revision=config.revision,
        inference_mode=True,
        target_parameters=stacks or None,
    )
    layers = [module for module in modules if module not in stacks]
    stock.target_modules = target_names([config], layers) if layers else []  # set later: PEFT would make it a set
    return stock
