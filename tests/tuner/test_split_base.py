"""Weights that are split over processes, on two: refused by name wherever adapters would see a part of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import alora_kernels
from alora_kernels import FusedALoRALinear
from alora_kernels.baselines.layers import HydraLinear
from alora_kernels.tuner.targets import check_target

from ..support.ranks import WORLD, on_ranks
from ..support.tiny import Mlp, adapted, config, llama, tokens

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
IDS = [0, 1]


def _answer(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The text of the ValueError that a call ends in."""
    try:
        call(*args, **options)
    except ValueError as error:
        return str(error)
    return "nothing was said"


def _tensor_parallel(folder: Path) -> Any:
    split = DistributedConfig(tp_size=WORLD)
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64, distributed_config=split)


def _sharded(model: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _mlp(**plan: Any) -> Any:
    """A tiny model, split by torch's own plan after it was adapted."""
    model = adapted(Mlp(), target_modules=["up", "down"], task_type=None)
    mesh = init_device_mesh("cpu", (WORLD,))
    return parallelize_module(model, mesh, {f"base_model.model.{name}.base_layer": p for name, p in plan.items()})


def _refusals(folder: Path) -> dict[str, str]:
    adapters, x = config(target_modules=TARGETS), torch.randn(2, 8)
    base = _tensor_parallel(folder)
    before = {name: type(module) for name, module in base.named_modules()}
    q_proj = base.model.layers[0].self_attn.q_proj
    said = {
        "adapt": _answer(get_peft_model, base, adapters),
        "load": _answer(PeftModel.from_pretrained, base, folder / "adapter"),
        "transformers loads": _answer(base.load_adapter, str(folder / "adapter")),
        "drop-in": _answer(FusedALoRALinear.from_linear, q_proj, 2, tasks=2),
        "target": _answer(check_target, base, "model.layers.0.self_attn.q_proj", 1),
        "baseline": _answer(HydraLinear, q_proj, 2, num_experts=2),
        "fsdp first": _answer(get_peft_model, _sharded(llama()), adapters),
    }
    said["untouched"] = str(before == {name: type(module) for name, module in base.named_modules()})
    for name, plan in {"columns": {"up": ColwiseParallel()}, "rows": {"down": RowwiseParallel()}}.items():
        with alora_kernels.route(torch.tensor(IDS)):
            said[f"{name} after"] = _answer(_mlp(**plan), x)
    layer = FusedALoRALinear(8, 6, 2, tasks=2)
    mesh = init_device_mesh("cpu", (WORLD,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh), requires_grad=False)
    said["drop-in after"] = _answer(layer, x, torch.tensor(IDS))
    return said


def _fsdp(folder: Path) -> dict[str, Any]:
    """A model that was adapted first: its loss and gradients on this rank's row, and what becomes of saving it."""
    model = adapted(llama().double(), target_modules=TARGETS)
    _sharded(model.base_model.model)
    row = tokens()[dist.get_rank()].unsqueeze(0)
    loss = model(input_ids=row, labels=row, adapter_names=[["math", "code"][dist.get_rank()]]).loss
    loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    out = folder / f"saved by {dist.get_rank()}"
    said = _answer(model.save_pretrained, out)
    written = [path.name for path in out.glob("*.safetensors")]
    model.save_pretrained(out, state_dict=get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return {"loss": loss.item(), "grads": grads, "said": said, "written": written}


def _work(folder: Path) -> dict[str, Any]:
    return {"refusals": _refusals(folder), "fsdp": _fsdp(folder)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("split")
    llama().double().save_pretrained(folder / "base")
    adapted(target_modules=TARGETS).save_pretrained(folder / "adapter")
    return folder, on_ranks(_work, folder / "ranks", folder)


NAMED = {
    "adapt": "model.embed_tokens.weight is a DTensor, (Shard(dim=0),) over",
    "load": "model.embed_tokens.weight is a DTensor",
    "transformers loads": "model.embed_tokens.weight is a DTensor",
    "drop-in": "weight is a DTensor",
    "target": "model.layers.0.self_attn.q_proj.weight is a DTensor",
    "baseline": "weight is a DTensor",
    "fsdp first": "model.embed_tokens.weight is a DTensor",
    "columns after": "up.weight is a DTensor, (Shard(dim=0),)",
    "rows after": "down.weight is a DTensor, (Shard(dim=1),)",
    "drop-in after": "weight is a DTensor, (Replicate(),)",
}


@pytest.mark.parametrize("case", NAMED)
def test_a_part_of_a_weight_is_refused_by_name(ranks, case):
    for rank in ranks[1]:
        said = rank["refusals"][case]
        assert said.startswith(NAMED[case])
        assert "load the base without tensor parallelism (tp_plan, parallelize_module)" in said
        assert rank["refusals"]["untouched"] == "True"


def test_a_model_that_fsdp2_shards_after_it_was_adapted_computes_as_one_process(ranks):
    model, rows = adapted(llama().double(), target_modules=TARGETS), tokens()
    loss = model(input_ids=rows, labels=rows, adapter_names=["math", "code"]).loss
    loss.backward()
    torch.testing.assert_close(sum(rank["fsdp"]["loss"] for rank in ranks[1]) / WORLD, loss.item())
    for rank in ranks[1]:
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(rank["fsdp"]["grads"][name], p.grad)


def test_parts_are_not_saved_and_gathered_they_are_the_adapter(ranks, tmp_path):
    folder, results = ranks
    adapted(llama().double(), target_modules=TARGETS).save_pretrained(tmp_path)
    want = load_file(tmp_path / "adapter_model.safetensors")
    for rank, result in enumerate(results):
        assert "asymlora_A" in result["fsdp"]["said"] and "is a DTensor" in result["fsdp"]["said"]
        assert result["fsdp"]["written"] == []
        saved = load_file(folder / f"saved by {rank}" / "adapter_model.safetensors")
        assert saved.keys() == want.keys()
        assert all(torch.equal(saved[name], want[name]) for name in want)


def test_a_plan_of_transformers_that_leaves_plain_tensors_is_refused():
    """Versions before 5.17 split into plain tensors and say so on the module alone."""
    base = llama()
    base.model.layers[1].mlp.up_proj._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj is split over processes by the tp_plan"):
        adapted(base)
