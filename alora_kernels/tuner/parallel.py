"""Tensor parallelism by the plans of transformers: every process holds a part of A or of B, and sees the same batch.

| rule | W and x | A | B | summed over processes |
|---|---|---|---|---|
| colwise | W split along N, x whole | whole | along N, as W | dh `[M, R]` in the backward |
| rowwise | W and x split along K | along K, as W | whole | h `[M, R]`; under soft routing `[M, E R + E]` |
| those that gather | x and y whole | whole | whole | nothing |

Sums are as small as R, and every gradient is that of one process. Parameters are DTensors, which PEFT gathers to save
and splits when it loads. `ALoRAModel` asks `split_of`; other rules, and other ways to split a model, are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import autograd, trusted_alora
from ..ops.checks import check_whole
from ..ops.products import no_autocast
from ..ops.torch_backend import drop
from ..ops.types import Adapter, wider
from ..records import acc_dtype
from .base_layer import base_of

RULES = {"colwise": "columns", "rowwise": "rows"} | dict.fromkeys(
    ("colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep"), "whole"
)
MATRICES = {"lora_A": "rows", "router": "rows", "lora_B": "columns"}  # by what they are split


@dataclass(frozen=True)
class Split:
    """How the adapters of one layer lie on the processes of a mesh: by "columns", by "rows", or "whole" on each."""

    mesh: Any
    kind: str

    def part(self, matrix: str, weight: Tensor) -> nn.Parameter:
        """A matrix, named as in the op, as rank 0 drew it: a DTensor of which this process holds its part."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        placement = Shard(0 if matrix == "lora_B" else weight.dim() - 1)
        placed = distribute_tensor(weight, self.mesh, [placement if MATRICES[matrix] == self.kind else Replicate()])
        return nn.Parameter(placed)

    def seed(self, seed: Tensor) -> Tensor:
        """A seed of dropout: rank 0's where x is the same everywhere, so that masks are, else another on each rank."""
        if self.kind == "rows":
            return seed + self.mesh.get_local_rank()
        group = self.mesh.get_group()
        torch.distributed.broadcast(seed, torch.distributed.get_global_rank(group, 0), group)
        return seed

    def delta(self, x: Tensor, out: Tensor, adapter: dict[str, Any]) -> Tensor:
        """This process's part of the base's output, plus that of an adapter."""
        parts = {name: t.to_local() for name in MATRICES if (t := adapter[name]) is not None}
        return trusted_alora(x, base=out, split=self, **(adapter | parts))

    def shrink(self, x: Tensor, adapter: Adapter, backend: str) -> Tensor:
        """h of the whole x, and its gradient from the whole y."""
        if self.kind == "rows" and adapter.router is not None:
            return self._soft(x, adapter)
        return self._summed(autograd.linear(x, None, None, None, adapter, backend))

    def _summed(self, h: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if self.kind == "whole":
            return h
        if self.kind == "columns":  # the gradient is this part's
            whole = DTensor.from_local(h, self.mesh, [Replicate()], run_check=False)
            return whole.to_local(grad_placements=[Partial()])
        partial = DTensor.from_local(h, self.mesh, [Partial()], run_check=False)
        return partial.redistribute(placements=[Replicate()]).to_local()

    def _soft(self, x: Tensor, adapter: Adapter) -> Tensor:
        """h under a router that sees a part of x: logits are summed before their softmax."""
        assert adapter.router is not None
        experts, rank, _ = adapter.a.shape
        dtype = wider(x, adapter.a, adapter.router)
        with no_autocast(x.device.type):
            dropped, _ = drop(x, adapter)
            low = dropped.to(dtype) @ adapter.a.flatten(0, 1).to(dtype).t()
            p = self._summed(torch.cat((low, x.to(dtype) @ adapter.router.to(dtype).t()), dim=1))
            low, gate = p[:, : experts * rank], torch.softmax(p[:, experts * rank :].to(acc_dtype(x.dtype)), dim=1)
            h = torch.bmm(gate.unsqueeze(1), low.unflatten(1, (experts, rank)).to(gate.dtype)).squeeze(1)
        return (h * adapter.scaling).to(dtype)


def refuse_copies(model: nn.Module, modules: Any) -> None:
    """Raise a ValueError for split modules that PEFT would copy: a copy's forward is bound to the original's weight."""
    for name, module in model.named_modules():
        within = [name, *(name[:i] for i, letter in enumerate(name) if letter == ".")]  # itself and what holds it
        if "forward" in vars(module) and any(path.endswith(saved) for path in within for saved in modules or ()):
            raise ValueError(
                f"{name} in modules_to_save would not train, since processes share it: put it into target_modules, or"
                " load the base without tensor parallelism"
            )


def is_split(model: nn.Module) -> bool:
    """Whether transformers has split the model over processes."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def split_of(model: nn.Module, name: str) -> Split | None:
    """How a target's adapters are split; None where its weights are whole.

    A ValueError for a rule that is none of `RULES`, and for a weight that does not lie as its rule says.
    """
    if not is_split(model):
        return None
    plan: Any = getattr(model, "tp_plan", None) or {}
    rule = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
    base = base_of(model.get_submodule(name))
    weight: Any = base._parameters.get("weight")
    if rule not in RULES:
        known = ", ".join(RULES)
        raise ValueError(
            f"{name} has {f'the rule {rule!r}' if rule else 'no rule'} in the tp_plan of the model, and adapters can be"
            f" split by {known}: leave it out of target_modules, or load the base without tensor parallelism"
        )
    from torch.distributed.tensor import Shard

    placements = (Shard(1 if rule.startswith("row") else 0),)
    if type(base) is nn.Linear and getattr(weight, "placements", None) == placements:
        return Split(weight.device_mesh, RULES[rule])
    check_whole(base._parameters, name)
    raise ValueError(f"{name} is not split as its rule {rule!r} says: load the base without tensor parallelism")
