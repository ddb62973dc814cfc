"""Resident A's: every adapted layer holds `capacity` of them in one tensor, and one B that all tasks share.

A slot's number is the task id of a request's tokens. A is allocated once, `[capacity, R, K]` per layer, so its address
stays the same for CUDA graphs and a task comes or goes by copying its own rows. Rows of a free slot are stale and
nothing may be routed to them. Smaller ranks are padded with zero rows, which add nothing; so only the first columns of
B have to agree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapters.config import refused
from ..adapters.reader import AdapterFile
from ..tuner import ALoRAConfig, ALoRALayer, CheckpointGuard
from ..tuner.base_layer import features
from ..tuner.layer import AdapterSpec
from ..tuner.targets import check_target

ADAPTER = "serving"
SHOWN = 5  # module names in an error
SAME_B, SAME_B_16BIT = 1e-5, 1e-2  # largest relative difference that is rounding


class Slots:
    """Layers for `capacity` tasks inside a model, in eval mode and without gradients; at first no task is in them.

    The file decides the modules, their `shapes` (N, R, K), scales and B, and the dtype if that is None. If it does not
    fit the model, an AdapterFolderError says why and the model is as it was.
    """

    @torch.inference_mode(False)  # rows are written later, outside of any inference mode the caller may be in
    def __init__(self, model: nn.Module, file: AdapterFile, capacity: int, dtype: torch.dtype | None = None) -> None:
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise ValueError("the model has adapters already: give the plain base model")
        _check_model(model, file)
        self.model, self.capacity, self.dtype = model, capacity, dtype or file.dtype
        self.shapes, self._scaling, self._base = dict(file.shapes), dict(file.scaling), file.base
        self._layers: dict[str, ALoRALayer] = {}
        self._before = (model.training, [p for p in model.parameters() if p.requires_grad])
        b = {module: _cast(file, module, tensor, self.dtype) for module, tensor in file.b.items()}
        try:
            self._inject(b)
        except BaseException:
            self.remove()
            raise

    def _inject(self, b: Mapping[str, Tensor]) -> None:
        # two tasks of rank 1 for PEFT to make its layers with; the tensors are replaced at once
        target = "|".join(re.escape(module) for module in self.shapes)
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(ALoRAConfig(r=1, tasks=2, target_modules=target), self.model, ADAPTER)
        self._layers = {n: m for n, m in self.model.named_modules() if isinstance(m, ALoRALayer)}
        if self._layers.keys() != self.shapes.keys():
            raise RuntimeError(f"PEFT adapted other modules than asked for: {_some(self._layers, self.shapes)}")
        # two names at least: with one, a layer would serve calls that say no task as if they had said this one
        slots = tuple(f"slot{i}" for i in range(max(self.capacity, 2)))
        for module, layer in self._layers.items():
            _, r, k = self.shapes[module]
            device = layer.asymlora_A[ADAPTER].weight.device
            a = torch.zeros(self.capacity, r, k, dtype=self.dtype, device=device)
            layer.asymlora_A[ADAPTER].weight = nn.Parameter(a, requires_grad=False)
            layer.asymlora_B[ADAPTER].weight = nn.Parameter(b[module].to(device), requires_grad=False)
            layer.asymlora_spec[ADAPTER] = AdapterSpec(r, self._scaling[module], 0.0, slots, self.capacity)
        self.model.eval().requires_grad_(False)

    def remove(self) -> None:
        """Take the layers out: the model is as it was."""
        layers = [(n, m) for n, m in self.model.named_modules() if isinstance(m, ALoRALayer)]
        for name, layer in layers:
            self.model.set_submodule(name, layer.base_layer)
        CheckpointGuard.remove(self.model)
        if "peft_config" in self.model.__dict__:
            del self.model.peft_config
        self._layers = {}
        training, trained = self._before
        self.model.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)

    @property
    def bytes_per_task(self) -> int:
        """Bytes of one task's A's in all layers."""
        return sum(r * k for _, r, k in self.shapes.values()) * self.dtype.itemsize

    @property
    def bytes_shared(self) -> int:
        """Bytes of the B's in all layers, held once for all tasks."""
        return sum(n * r for n, r, _ in self.shapes.values()) * self.dtype.itemsize

    def fit(self, file: AdapterFile) -> None:
        """Raise an AdapterFolderError unless every task of the folder can be served from these slots.

        With s and B fixed, A can be used as it is only where s B is the same.
        """
        if file.base and self._base and file.base != self._base:
            raise refused(file.folder, f"was trained on {file.base!r} but this store serves {self._base!r}")
        if file.shapes.keys() != self.shapes.keys():
            raise refused(file.folder, f"does not adapt the modules of the store: {_some(file.shapes, self.shapes)}")
        for module, (n, r, k) in file.shapes.items():
            own_n, own_r, own_k = self.shapes[module]
            if (n, k) != (own_n, own_k):
                raise refused(file.folder, f"{module} maps {k} features to {n} but the base maps {own_k} to {own_n}")
            if r > own_r:
                raise refused(file.folder, f"rank {r} does not fit the stack's rank {own_r} at {module}")
        self._check_b(file)
        parameters = self.model.named_parameters(remove_duplicate=False)
        file.check_copies({name.replace(".base_layer.", "."): p for name, p in parameters})

    def _check_b(self, file: AdapterFile) -> None:
        limit = SAME_B_16BIT if 2 in (file.dtype.itemsize, self.dtype.itemsize) else SAME_B
        different = {}
        for module, b in file.b.items():
            own = self._layers[module].asymlora_B[ADAPTER].weight[:, : b.shape[1]].to("cpu", torch.float64)
            own, other = own * self._scaling[module], b.to(torch.float64) * file.scaling[module]
            size = max(float(own.abs().max()), float(other.abs().max()), torch.finfo(torch.float64).tiny)
            difference = float((own - other).abs().max()) / size
            if not difference <= limit:  # nan, of an s B that is infinite, is no agreement
                different[module] = difference
        if different:
            where = max(different, key=lambda module: different[module])
            raise refused(
                file.folder,
                f"its B differs from the B that all tasks share (largest relative difference {different[where]:.2g} at"
                f" {where}): several LoRAs with B of their own become one ALoRA with `alora import`",
            )

    def rows(self, file: AdapterFile, task: str) -> dict[str, Tensor]:
        """A task's matrices as they lie in a slot: module -> `[R, K]` on the CPU, padded, in the slots' dtype."""
        rows = {}
        for module, a in file.matrices(task).items():
            a = _cast(file, module, a, self.dtype)
            missing = self.shapes[module][1] - a.shape[0]
            rows[module] = nn.functional.pad(a, (0, 0, 0, missing)) if missing else a
        return rows

    @torch.no_grad()
    def write(self, slot: int, matrices: Mapping[str, Tensor]) -> None:
        """Copy a task's matrices, `[r, K]` with r <= R, into a slot, and zeros into the rows above r.

        All are checked before the first is written; on return the device has them.
        """
        if matrices.keys() != self.shapes.keys():
            raise ValueError(f"matrices are not those of the stack: {_some(matrices, self.shapes)}")
        for module, a in matrices.items():
            _, r, k = self.shapes[module]
            if a.dim() != 2 or a.shape[0] > r or a.shape[1] != k:
                raise ValueError(f"{module}: matrices must be at most [{r}, {k}], got {list(a.shape)}")
        for module, a in matrices.items():
            held = self._layers[module].asymlora_A[ADAPTER].weight[slot]
            held[: a.shape[0]].copy_(a)
            held[a.shape[0] :].zero_()
        for device in {layer.asymlora_A[ADAPTER].weight.device for layer in self._layers.values()}:
            if device.type == "cuda":  # the engine runs on a stream of its own
                torch.cuda.current_stream(device).synchronize()

    @torch.no_grad()
    def read(self, slot: int) -> dict[str, Tensor]:
        """Copies of a slot's matrices: module -> `[R, K]` on the CPU."""
        return {m: layer.asymlora_A[ADAPTER].weight[slot].to("cpu", copy=True) for m, layer in self._layers.items()}


def _check_model(model: nn.Module, file: AdapterFile) -> None:
    """Refuse a file whose modules the model lacks or has in another shape."""
    modules = dict(model.named_modules())
    missing = [name for name in file.shapes if name not in modules]
    if missing:
        raise refused(file.folder, f"the base has no {', '.join(missing[:SHOWN])} ({len(missing)} modules missing)")
    for name, (n, _, k) in file.shapes.items():
        try:
            check_target(modules[name], modules[name.rpartition(".")[0]], name, experts=2, soft=False)
            own_k, own_n = features(modules[name])
        except ValueError as error:
            raise refused(file.folder, str(error)) from None
        if (n, k) != (own_n, own_k):
            raise refused(
                file.folder,
                f"{name} maps {k} features to {n} but the base maps {own_k} to {own_n}: serve it on the base it was"
                " trained on",
            )
    file.check_copies(dict(model.named_parameters(remove_duplicate=False)))


def _cast(file: AdapterFile, module: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype, unless that makes a number infinite."""
    cast = tensor.to(dtype)
    if not bool(cast.isfinite().all()):
        raise refused(file.folder, f"{module} holds a number too large for {dtype}: use a wider dtype")
    return cast


def _some(found: Mapping[str, object], wanted: Mapping[str, object]) -> str:
    """The first few names that are missing or too many."""
    parts = []
    for title, names in (("missing", wanted.keys() - found.keys()), ("extra", found.keys() - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:SHOWN])
            parts.append(f"{title} {shown}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""))
    return "; ".join(parts)
