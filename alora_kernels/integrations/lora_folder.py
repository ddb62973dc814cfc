"""Stock PEFT LoRA folders: read without a model, written whole.

In:   a folder with `adapter_config.json` and `adapter_model.safetensors`; or matrices by module name.
Out:  `LoRAFolder`, which gives A, B and s of each module; or such a folder.
Who:  `export` writes folders, `import_lora` reads them.

What can be read is y = W x + s B A x and nothing else. Every setting of PEFT that means more than that (DoRA, biases,
initialisations that change the base) is refused by name: it would be lost without a sign. Matrices are read one module
at a time, because many adapters together may be larger than the memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..modules.init import lora_scaling
from .peft.files import CARD, CONFIG, PICKLE, WEIGHTS, written_whole

PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")

# settings under which the model is more than W x + s B A x, and what they are called in the message
MORE_THAN_LORA = {
    "use_dora": "DoRA, which rescales the base's columns",
    "use_qalora": "QA-LoRA, which pools the input",
    "lora_bias": "a bias on B",
    "modules_to_save": "modules trained in full",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "adapters on parameters instead of modules",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "Activated LoRA, which starts at an invocation token",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "megatron_config": "Megatron's parallel layers",
}
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # the others may change the base's weights


class Factors(NamedTuple):
    """One module of a LoRA: its change of the weight is s B A.

    Attributes:
        a: `[R, K]`.
        b: `[N, R]`.
        s: scaling.
    """

    a: Tensor
    b: Tensor
    s: float


class Shape(NamedTuple):
    """Rank, input and output width of one adapted module."""

    r: int
    k: int
    n: int


@dataclass(frozen=True)
class LoRAFolder:
    """A stock LoRA adapter on the disk.

    Attributes:
        path: its folder.
        config: what PEFT stored about it.
        shapes: module -> (R, K, N), by name.
    """

    path: Path
    config: LoraConfig
    shapes: dict[str, Shape]

    @property
    def base(self) -> str | None:
        """Name of the base model, if the folder says it."""
        return self.config.base_model_name_or_path or None

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max(shape.r for shape in self.shapes.values())

    @property
    def bytes(self) -> int:
        """Size of the weights file."""
        return (self.path / WEIGHTS).stat().st_size

    def scaling(self, module: str) -> float:
        """s of one module, by the config's patterns."""
        config: Any = self.config
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        return lora_scaling(alpha, self.shapes[module].r, config.use_rslora)

    def factors(self, module: str) -> Factors:
        """A, B and s of one module, read from the file.

        Raises:
            ValueError: the file does not read, or holds numbers that are not finite.
        """
        with _opened(self.path) as file:
            a, b = (file.get_tensor(f"{PREFIX}{module}.lora_{part}.weight") for part in "AB")
        for part, tensor in (("A", a), ("B", b)):
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.path}: lora_{part} of {module} holds numbers that are not finite")
        return Factors(a, b, self.scaling(module))


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from None


def read_lora(folder: str | Path) -> LoRAFolder:
    """Open a folder that PEFT's `save_pretrained` wrote for a LoRA adapter, and check all but the numbers.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        Shapes and config; matrices come from `LoRAFolder.factors`.

    Raises:
        ValueError: no such adapter, a pickle, a damaged file, or an adapter that is more than s B A.
    """
    path = Path(folder)
    _check_plain(path, _stored_config(path))
    config: Any = LoraConfig.from_pretrained(str(path))
    with _opened(path) as file:
        shapes = _shapes(path, {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
    for module, shape in shapes.items():
        r = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
        if r != shape.r:
            raise ValueError(f"{path}: {module} has rank {shape.r} in {WEIGHTS} but {r} in {CONFIG}: they do not belong"
                             " together, save the adapter again")  # fmt: skip
    return LoRAFolder(path, config, shapes)


def _stored_config(path: Path) -> dict[str, Any]:
    """The config as written, once it is sure that the folder holds a LoRA in safetensors."""
    if not (path / CONFIG).is_file():
        inside = sorted(p.parent.name for p in path.glob(f"*/{CONFIG}"))
        hint = f"; its subfolders {', '.join(inside[:5])} are adapters" if inside else ""
        raise ValueError(f"{path} has no {CONFIG}: give a folder that PEFT's save_pretrained wrote{hint}")
    try:
        stored = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        kind = stored["peft_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / CONFIG} is damaged: {error!r}") from None
    if kind == "ASYMLORA":
        raise ValueError(f"{path} is an ALoRA adapter already, not a stock LoRA: `alora export` makes LoRAs of it")
    if kind != "LORA":
        raise ValueError(f"{path} is an adapter of type {kind}, not LORA: only plain LoRA can be read")
    if not (path / WEIGHTS).is_file():
        pickled = (path / PICKLE).exists()
        remedy = f"{PICKLE} is a pickle, which could run code: load it with PEFT and save it again" if pickled else (
            "save the adapter again")  # fmt: skip
        raise ValueError(f"{path} has no {WEIGHTS}: {remedy}")
    return dict(stored)


def _check_plain(path: Path, stored: Mapping[str, Any]) -> None:
    for name, meaning in MORE_THAN_LORA.items():
        if stored.get(name):
            raise ValueError(f"{path} uses {meaning} ({name}): only plain LoRA, s B A, can be read")
    if stored.get("bias", "none") != "none":
        raise ValueError(f"{path} trained biases (bias={stored['bias']!r}): only plain LoRA, s B A, can be read")
    start = stored.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{path} started with init_lora_weights={start!r}, which may change the base's weights, so its A and B are"
            " not the whole change: save it again with save_pretrained(path_initial_model_for_weight_conversion=...)"
        )


def _shapes(path: Path, found: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
    """Module -> shape, from the keys of the file."""
    parts: dict[str, dict[str, Sequence[int]]] = {}
    for key, shape in found.items():
        match = KEY.fullmatch(key)
        if match is None:
            kind = "part of an embedding" if "embed" in key else "no matrix of a linear layer's LoRA"
            raise ValueError(f"{path}: {key} is {kind}: only plain LoRA of linear layers can be read")
        if len(shape) != 2:
            raise ValueError(f"{path}: {key} has {len(shape)} dimensions, a convolution's: leave that layer out")
        parts.setdefault(match[1], {})[match[2]] = shape
    if not parts:
        raise ValueError(f"{path}: {WEIGHTS} holds no adapted module")
    shapes = {}
    for module, pair in sorted(parts.items()):
        if set(pair) != {"A", "B"} or pair["A"][0] != pair["B"][1]:
            raise ValueError(f"{path}: {module} has no fitting pair of lora_A and lora_B, but {pair}")
        shapes[module] = Shape(pair["A"][0], pair["A"][1], pair["B"][0])
    return shapes


def target_names(configs: Iterable[Any], modules: Iterable[str]) -> list[str]:
    """`target_modules` that select the same modules without any other setting.

    Args:
        configs: of the adapters the modules come from.
        modules: their full names.

    Returns:
        The names that all the configs list, where a list alone says it; otherwise the modules' full names.
    """
    listed, whole = [], True
    for config in configs:
        narrowed = bool(config.exclude_modules) or config.layers_to_transform is not None
        whole = whole and not narrowed and not isinstance(config.target_modules, str) and bool(config.target_modules)
        listed.append(set(config.target_modules or ()))
    exact = sorted(modules)
    if not whole or any(names != listed[0] for names in listed):
        return exact
    fits = all(any(m == t or m.endswith(f".{t}") for t in listed[0]) for m in exact)
    return sorted(listed[0]) if fits else exact


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise unless an adapter may be written to the folder.

    Raises:
        ValueError: it holds an adapter and `overwrite` is False, or it holds something else.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give the path of a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not empty and holds no adapter: give another folder")
    if not overwrite:
        raise ValueError(f"{folder} holds an adapter: say overwrite (--overwrite) to replace it, or give another")


def write_lora(folder: Path, matrices: Mapping[str, tuple[Tensor, Tensor]], config: LoraConfig, card: str) -> int:
    """Write a stock LoRA folder, whole or not at all.

    Args:
        folder: made if needed.
        matrices: module -> (A `[R, K]`, B `[N, R]`), with the scaling already in B.
        config: of the same rank, with lora_alpha = R.
        card: text of README.md.

    Returns:
        Bytes of the weights file.
    """
    tensors = {}
    for module, (a, b) in matrices.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()
    with written_whole(folder) as temporary:
        save_file(tensors, Path(temporary, WEIGHTS), metadata={"format": "pt"})
        config.save_pretrained(temporary)
        Path(temporary, CARD).write_text(card, encoding="utf-8")
    return (folder / WEIGHTS).stat().st_size
