"""Weights that are split over processes, on two: as one process where a plan says how, else refused by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
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
from alora_kernels.tuner import set_task
from alora_kernels.tuner.targets import check_target

from ..support.ranks import WORLD, on_ranks
from ..support.tiny import Mlp, adapted, config, layers_of, llama, tokens

FEW = ["q_proj", "o_proj", "up_proj", "down_proj"]
ALL = [*FEW, "k_proj", "v_proj", "gate_proj", "lm_head"]
MLP = "model.layers.*.mlp"
GATHERS = {"down_proj": "rowwise_split_input", "up_proj": "colwise_rep", "gate_proj": "colwise_rep"}
PLANS: dict[str, Any] = {"task": None, "soft": {f"{MLP}.{name}": rule for name, rule in GATHERS.items()}}


def _base() -> Any:
    model = llama(attention_bias=True, mlp_bias=True).double()
    for p in model.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return model


def _split(folder: Path, plan: Any = None) -> Any:
    how = DistributedConfig(tp_size=WORLD, tp_plan=plan)
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64, distributed_config=how)


def _answer(call: Callable[..., Any], *args: Any, **options: Any) -> str:
    """The text of the ValueError that a call ends in."""
    try:
        call(*args, **options)
    except ValueError as error:
        return str(error)
    return "nothing was said"


def _step(model: Any, routing: str, **options: Any) -> dict[str, Any]:
    """Loss in float64, last hidden states and whole gradients of a batch."""
    rows, names = tokens(), {"adapter_names": ["math", "code"]} if routing == "task" else {}
    out = model(input_ids=rows, output_hidden_states=True, **names, **options)
    model.zero_grad()
    loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), rows.flatten())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}
    return {
        "loss": loss.detach(),
        "hidden": out.hidden_states[-1].detach(),
        "grads": whole,
        "logits": out.logits.detach(),
    }


def _same(tensor: Any) -> bool:
    """Whether a tensor, or the part of it that is here, is the same on all ranks."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    parts = [torch.empty_like(local) for _ in range(WORLD)]
    dist.all_gather(parts, local.detach().contiguous())
    return all(torch.equal(part, parts[0]) for part in parts)


def _whole(model: Any, adapter: str) -> list[Any]:
    """The parameters of an adapter of which each rank has all."""
    named = [p for name, p in model.named_parameters() if f".{adapter}." in name]
    return [p for p in named if p.placements[0].is_replicate()]


def _parallel(folder: Path, routing: str) -> dict[str, Any]:
    rank = dist.get_rank()
    torch.manual_seed(10 + rank)
    model = PeftModel.from_pretrained(_split(folder, PLANS[routing]), folder / routing, is_trainable=True).eval()
    found = _step(model, routing)
    rows, names = tokens(), {"adapter_names": ["math", "code"]} if routing == "task" else {}
    with torch.no_grad():
        found["no grad"] = model(input_ids=rows, **names).logits
    model.save_pretrained(folder / f"{routing} saved by {rank}")
    if routing == "task":
        set_task(model, "code")
        found["merged"] = _answer(model.merge_adapter)
    by_transformers = _split(folder, PLANS[routing])
    by_transformers.load_adapter(str(folder / routing))
    with torch.no_grad(), alora_kernels.route(torch.tensor([0, 1])) if names else nullcontext():
        found["by transformers"] = by_transformers(input_ids=rows).logits
    model.add_adapter("more", config(target_modules=ALL, routing=routing, lora_dropout=0.3))
    model.set_adapter("more")
    found["new"] = [_same(p) for p in _whole(model, "more")]
    found["without dropout"] = _step(model, routing)["hidden"]
    model.train()
    torch.manual_seed(20 + rank)
    dropped = _step(model, routing)
    found["dropped"], found["one mask"] = dropped["hidden"], [_same(dropped["hidden"])]
    found["one mask"] += [_same(p.grad) for p in _whole(model, "more")]
    splits = {layer.split.kind: layer.split for layer in layers_of(model)}
    found["drawn"] = {kind: split.seed(torch.tensor([rank if kind != "rows" else 7])) for kind, split in splits.items()}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(20 + rank)
    again = _step(model, routing, use_cache=False)
    found["recomputed"] = all(torch.equal(again["grads"][name], grad) for name, grad in dropped["grads"].items())
    model.set_adapter("default")
    model.delete_adapter("more")
    trained = [p for p in model.parameters() if p.requires_grad]
    _step(model.eval(), routing)
    torch.nn.utils.clip_grad_norm_(trained, 0.1)
    torch.optim.AdamW(trained, lr=0.01).step()
    found["trained"] = {name: p.full_tensor().detach() for name, p in model.named_parameters() if p.requires_grad}
    return found


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
    x = torch.randn(2, 8)
    base, packed = _split(folder), _split(folder, {f"{MLP}.up_proj": "packed_colwise"})
    before = {name: type(module) for name, module in packed.named_modules()}
    q_proj = base.model.layers[0].self_attn.q_proj
    mesh = init_device_mesh("cpu", (WORLD,))
    own = parallelize_module(Mlp(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    said = {
        "packed": _answer(get_peft_model, packed, config(target_modules=FEW)),
        "load": _answer(PeftModel.from_pretrained, packed, folder / "task"),
        "transformers loads": _answer(packed.load_adapter, str(folder / "task")),
        "torch's plan": _answer(get_peft_model, own, config(target_modules=["up"], task_type=None)),
        "saved whole": _answer(get_peft_model, base, config(target_modules=FEW, modules_to_save=["0.mlp.up_proj"])),
        "saved inside": _answer(get_peft_model, base, config(target_modules=FEW, modules_to_save=["mlp"])),
        "serving": _answer(check_target, base, "model.layers.0.self_attn.q_proj", 1),
        "drop-in": _answer(FusedALoRALinear.from_linear, q_proj, 2, tasks=2),
        "baseline": _answer(HydraLinear, q_proj, 2, num_experts=2),
        "fsdp first": _answer(get_peft_model, _sharded(llama()), config(target_modules=FEW)),
    }
    said["untouched"] = str(before == {name: type(module) for name, module in packed.named_modules()})
    base.tp_plan = {name: rule for name, rule in base.tp_plan.items() if "q_proj" not in name}
    said["no rule"] = _answer(get_peft_model, base, config(target_modules=FEW))
    base.tp_plan = base.tp_plan | {"model.layers.*.self_attn.q_proj": "rowwise"}
    said["another rule"] = _answer(get_peft_model, base, config(target_modules=FEW))
    for name, plan in {"columns": {"up": ColwiseParallel()}, "rows": {"down": RowwiseParallel()}}.items():
        with alora_kernels.route(torch.tensor([0, 1])):
            said[f"{name} after"] = _answer(_mlp(**plan), x)
    layer = FusedALoRALinear(8, 6, 2, tasks=2)
    layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh), requires_grad=False)
    said["drop-in after"] = _answer(layer, x, torch.tensor([0, 1]))
    return said


def _fsdp(folder: Path) -> dict[str, Any]:
    """A model that was adapted first: its loss and gradients on this rank's row, and what becomes of saving it."""
    rank = dist.get_rank()
    model = adapted(llama().double(), target_modules=FEW)
    _sharded(model.base_model.model)
    row = tokens()[rank].unsqueeze(0)
    loss = model(input_ids=row, labels=row, adapter_names=[["math", "code"][rank]]).loss
    loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.requires_grad}
    out = folder / f"fsdp saved by {rank}"
    said = _answer(model.save_pretrained, out)
    written = [path.name for path in out.glob("*.safetensors")]
    model.save_pretrained(out, state_dict=get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return {"loss": loss.item(), "grads": grads, "said": said, "written": written}


def _work(folder: Path) -> dict[str, Any]:
    found = {routing: _parallel(folder, routing) for routing in PLANS}
    return found | {"refusals": _refusals(folder), "fsdp": _fsdp(folder)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("split")
    _base().save_pretrained(folder / "base")
    for routing in PLANS:
        adapted(_base(), target_modules=ALL, routing=routing).save_pretrained(folder / routing)
    return folder, on_ranks(_work, folder / "ranks", folder)


def _one_process(folder: Path, routing: str) -> Any:
    return PeftModel.from_pretrained(_base(), folder / routing, is_trainable=True).eval()


def _saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("routing", PLANS)
def test_two_ranks_compute_as_one_process(ranks, routing):
    folder, results = ranks
    model = _one_process(folder, routing)
    want = _step(model, routing)
    with model.disable_adapter():
        assert (want["hidden"] - model.model.model(tokens())[0]).abs().max() > 0.1
    for rank in results:
        found = rank[routing]
        for key in ("loss", "hidden", "grads"):
            # Llama's norms round to float32, or it would be 1e-15
            torch.testing.assert_close(found[key], want[key], rtol=0, atol=1e-7)
    for rank in results:
        for key in ("no grad", "by transformers"):
            torch.testing.assert_close(rank[routing][key], want["logits"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("routing", PLANS)
def test_one_folder_is_loaded_split_and_saved_whole(ranks, routing):
    folder, _ = ranks
    want = _saved(folder / routing)
    for rank in range(WORLD):
        saved = _saved(folder / f"{routing} saved by {rank}")
        assert saved.keys() == want.keys()
        assert all(torch.equal(saved[name], want[name]) for name in want)


@pytest.mark.parametrize("routing", PLANS)
def test_an_optimizer_trains_the_parts(ranks, routing):
    folder, results = ranks
    model = _one_process(folder, routing)
    _step(model, routing)
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 0.1)
    torch.optim.AdamW(trained, lr=0.01).step()
    want = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    for rank in results:
        torch.testing.assert_close(rank[routing]["trained"], want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("routing", PLANS)
def test_ranks_agree_on_what_they_draw(ranks, routing):
    """A new adapter's matrices and masks of dropout, though their generators differ; parts have masks of their own."""
    drawn = [rank[routing]["drawn"] for rank in ranks[1]]
    assert {kind: (drawn[0][kind] == drawn[1][kind]).item() for kind in drawn[0]} == {
        "columns": True,
        "rows": False,
        "whole": True,
    }
    for rank in ranks[1]:
        found = rank[routing]
        assert found["new"] and all(found["new"])
        assert len(found["one mask"]) > 1 and all(found["one mask"])
        assert (found["dropped"] - found["without dropout"]).abs().max() > 1e-3
        assert found["recomputed"]


def test_a_split_weight_takes_no_merge(ranks):
    for rank in ranks[1]:
        assert "split over processes, and merging takes a whole weight" in rank["task"]["merged"]


WHOLE = "load the base without tensor parallelism (tp_plan, parallelize_module)"
NAMED = {
    "packed": ("model.layers.0.mlp.up_proj has the rule 'packed_colwise'", "leave it out of target_modules"),
    "load": ("model.layers.0.mlp.up_proj has the rule 'packed_colwise'", "leave it out of target_modules"),
    "transformers loads": ("model.layers.0.mlp.up_proj has the rule 'packed_colwise'", "leave it out"),
    "no rule": ("model.layers.0.self_attn.q_proj has no rule", "colwise, rowwise, colwise_gather_output"),
    "another rule": ("model.layers.0.self_attn.q_proj.weight is a DTensor, (Shard(dim=0),)", WHOLE),
    "torch's plan": ("up.weight is a DTensor, (Shard(dim=0),)", WHOLE),
    "saved whole": ("model.layers.0.mlp.up_proj in modules_to_save would not train", "put it into target_modules"),
    "saved inside": ("model.layers.0.mlp.gate_proj in modules_to_save would not train", "put it into target_modules"),
    "serving": ("model.layers.0.self_attn.q_proj.weight is a DTensor", WHOLE),
    "drop-in": ("weight is a DTensor", WHOLE),
    "baseline": ("weight is a DTensor", WHOLE),
    "fsdp first": ("model.embed_tokens.weight is a DTensor, (Shard(dim=0),) over", "then call fully_shard on it"),
    "columns after": ("up.weight is a DTensor, (Shard(dim=0),)", WHOLE),
    "rows after": ("down.weight is a DTensor, (Shard(dim=1),)", WHOLE),
    "drop-in after": ("weight is a DTensor, (Replicate(),)", WHOLE),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_part_of_a_weight_is_refused_by_name(ranks, case):
    for rank in ranks[1]:
        said, (name, remedy) = rank["refusals"][case], NAMED[case]
        assert said.startswith(name) and remedy in said
        assert rank["refusals"]["untouched"] == "True"


def test_a_model_that_fsdp2_shards_after_it_was_adapted_computes_as_one_process(ranks):
    model, rows = adapted(llama().double(), target_modules=FEW), tokens()
    loss = model(input_ids=rows, labels=rows, adapter_names=["math", "code"]).loss
    loss.backward()
    torch.testing.assert_close(sum(rank["fsdp"]["loss"] for rank in ranks[1]) / WORLD, loss.item())
    for rank in ranks[1]:
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(rank["fsdp"]["grads"][name], p.grad)


def test_parts_of_fsdp2_are_not_saved_and_gathered_they_are_the_adapter(ranks, tmp_path):
    folder, results = ranks
    adapted(llama().double(), target_modules=FEW).save_pretrained(tmp_path)
    want = _saved(tmp_path)
    for rank, result in enumerate(results):
        assert "asymlora_A" in result["fsdp"]["said"] and "is a DTensor" in result["fsdp"]["said"]
        assert result["fsdp"]["written"] == []
        saved = _saved(folder / f"fsdp saved by {rank}")
        assert saved.keys() == want.keys()
        assert all(torch.equal(saved[name], want[name]) for name in want)


def test_a_plan_of_transformers_that_leaves_plain_tensors_is_refused():
    """Versions before 5.17 split into plain tensors and say so on the module alone."""
    base = llama()
    base.model.layers[1].mlp.up_proj._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj is split over processes by the tp_plan"):
        adapted(base)
