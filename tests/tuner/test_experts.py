"""Adapters on the experts of a mixture: what users do with them, and what is refused by name.

Values and gradients of whole models, row by row and beside stock PEFT, are in tests/models.
"""

from __future__ import annotations

import pickle
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import alora_kernels
from alora_kernels import ALoRAConfig, add_task, keep_routing, set_task, train_only
from alora_kernels.training.absent import KeepAbsentTasks
from alora_kernels.training.tasks import stacked_a
from alora_kernels.tuner import ALoRAModel
from alora_kernels.tuner.experts import ALoRAExperts, StackedWeight

from ..support.mixtures import FAMILIES, TASKS, adapted, mixture, tokens

NAMES = ["green", "red", "__base__"]


def logits(model: Any, names: Any = NAMES, ids: Any = None) -> torch.Tensor:
    ids = tokens(len(names)) if ids is None else ids
    with torch.no_grad():
        return model(input_ids=ids, adapter_names=names).logits  # type: ignore[no-any-return]


def stacks_of(model: nn.Module) -> list[StackedWeight]:
    return [m for m in model.modules() if isinstance(m, StackedWeight)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_without_a_change_it_is_the_base_by_any_implementation(family, implementation):
    base = mixture(family, implementation)
    right = base(input_ids=tokens(3)).logits
    model = adapted(base, init_weights=True)
    torch.testing.assert_close(logits(model), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sharing", [("shared", "each"), ("each", "each"), ("shared", "shared"), ("each", "shared")])
def test_shapes_and_names(sharing):
    model = adapted(experts_A=sharing[0], experts_B=sharing[1])
    a = [4] if sharing[0] == "each" else []
    b = [4] if sharing[1] == "each" else []
    named = {
        n.split("experts.")[1]: list(p.shape) for n, p in model.named_parameters() if "layers.0" in n and "asym" in n
    }
    assert named == {
        "gate_up_proj.asymlora_A.default.weight": [3, *a, 4, 32],
        "gate_up_proj.asymlora_B.default.weight": [*b, 48, 4],
        "down_proj.asymlora_A.default.weight": [3, *a, 4, 24],
        "down_proj.asymlora_B.default.weight": [*b, 32, 4],
    }
    assert all(p.requires_grad is ("asymlora" in n) for n, p in model.named_parameters())


def test_one_parameter_alone():
    model = adapted(target_parameters=["experts.down_proj"])
    assert {n.split(".asym")[0].rsplit(".", 1)[1] for n, _ in model.named_parameters() if "asym" in n} == {"down_proj"}
    set_task(model, "green")
    right = logits(model, ["green"] * 2)
    merged = deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens(2)).logits, right, rtol=1e-4, atol=1e-4)


def test_the_config_keeps_full_names(tmp_path):
    model = adapted()
    names = [f"model.layers.{i}.mlp.experts.{p}" for i in (0, 1) for p in ("gate_up_proj", "down_proj")]
    assert model.peft_config["default"].target_parameters == names
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(mixture(), tmp_path)
    assert torch.equal(logits(again.eval()), logits(model))


def test_a_second_adapter_adds_up_and_goes():
    model, names = adapted(), ["green", "red"]
    first = logits(model, names)
    torch.manual_seed(9)
    config = ALoRAConfig(r=2, tasks=TASKS, target_parameters="all-experts", init_weights=False, experts_B="shared")
    model.add_adapter("other", config)
    assert torch.equal(logits(model, names), first)
    model.set_adapter("other")
    second = logits(model, names)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, names)
    assert not torch.allclose(both, first, atol=1e-3) and not torch.allclose(both, second, atol=1e-3)
    weights = deepcopy(model)
    set_task(weights, "green")
    merged = weights.merge_and_unload(adapter_names=["default", "other"])
    torch.testing.assert_close(merged(input_ids=tokens(2)).logits[:1], both[:1], rtol=1e-3, atol=1e-3)
    model.base_model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model, names), first)


def test_disabled_unloaded_and_merged():
    base = mixture()
    right = base(input_ids=tokens(3)).logits
    model = adapted(deepcopy(base))
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=tokens(3)).logits, right)
    set_task(model, "blue")
    task = model(input_ids=tokens(3)).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=tokens(3)).logits, task, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="merged into the base"):
        logits(model)
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=tokens(3)).logits, task, rtol=1e-4, atol=1e-4)
    plain = model.unload()
    assert not any(isinstance(m, ALoRAExperts | StackedWeight) for m in plain.modules())
    torch.testing.assert_close(plain(input_ids=tokens(3)).logits, right, rtol=1e-4, atol=1e-4)


def test_several_tasks_and_none_said():
    with pytest.raises(ValueError, match="has the tasks red, green, blue and this call says none"):
        adapted()(input_ids=tokens(2))


def test_ids_per_token_and_packed_rows():
    model, ids = adapted(), tokens(2, 5)
    per_row = logits(model, ["green", "red"], ids)
    per_token = torch.tensor([[1] * 5, [0] * 5])
    assert torch.equal(logits(model, per_token, ids), per_row)


def gradients(model: Any, run: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run().logits.float().pow(2).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("sharing", [("shared", "each"), ("each", "shared")])
def test_activation_checkpoints(sharing):
    model = adapted(experts_A=sharing[0], experts_B=sharing[1]).train()
    run = lambda: model(input_ids=tokens(3), adapter_names=NAMES)  # noqa: E731
    right = gradients(model, run)
    model.gradient_checkpointing_enable()
    found = gradients(model, run)
    assert len(right) == 8 and right.keys() == found.keys()
    for name, gradient in right.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_checkpoint_without_the_routing_is_refused():
    model = adapted(mixture(num_hidden_layers=1)).train()
    experts = next(m for m in model.modules() if isinstance(m, ALoRAExperts))
    x, ids, weights = torch.randn(4, 32, requires_grad=True), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)

    def loss(function: Any) -> torch.Tensor:
        with alora_kernels.route(torch.tensor([0, 1, 2, -1])):
            return checkpoint(function, x, ids, weights, use_reentrant=False).sum()

    with pytest.raises(RuntimeError, match="does not keep the routing"):
        loss(experts).backward()
    with alora_kernels.route(torch.tensor([0, 1, 2, -1])):
        bound = keep_routing(experts)
    loss(bound).backward()


def test_train_only_and_add_task():
    model = adapted().train()
    before = logits(model, ["green", "red"])
    add_task(model, "white")
    assert torch.equal(logits(model, ["green", "red"]), before)
    assert {tuple(s.asymlora_A["default"].weight.shape[:1]) for s in stacks_of(model)} == {(4,)}
    train_only(model, ["white"])
    model(input_ids=tokens(2), adapter_names=["white", "red"]).logits.pow(2).mean().backward()
    for stack in stacks_of(model):
        gradient = stack.asymlora_A["default"].weight.grad
        assert gradient[3].any() and not gradient[:3].any()
        assert stack.asymlora_B["default"].weight.grad is None


@pytest.mark.parametrize("experts_a", ["shared", "each"])
def test_an_absent_task_stays_and_every_b_moves(experts_a):
    model = adapted(experts_A=experts_a).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    KeepAbsentTasks(optimizer, stacked_a(model))
    for names in (["red", "green", "blue"], ["red", "green", "red"]):
        before = {n: p.detach().clone() for n, p in model.named_parameters() if "asymlora" in n}
        optimizer.zero_grad()
        model(input_ids=tokens(3), adapter_names=names).logits.pow(2).mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        if "asymlora_A" in name:
            assert torch.equal(p[2], before[name][2]) and not torch.equal(p[0], before[name][0])
        elif "asymlora_B" in name:
            assert all(not torch.equal(now, old) for now, old in zip(p, before[name], strict=True))


def test_dropout_is_drawn_in_training_alone():
    model = adapted(lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def call(model: Any, ids: torch.Tensor, tasks: list[int]) -> torch.Tensor:
    experts = next(m for m in model.modules() if isinstance(m, ALoRAExperts))
    x = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), alora_kernels.route(torch.tensor(tasks, dtype=torch.long)):
        return experts(x, ids, torch.full(ids.shape, 0.5))  # type: ignore[no-any-return]


def test_rows_that_no_expert_takes_add_nothing():
    model = adapted()
    whole = call(model, torch.tensor([[0, 1], [2, 3], [1, 0]]), [0, 1, 2])
    dropped = call(model, torch.tensor([[0, 1], [4, 4], [1, -1]]), [0, 1, 2])
    torch.testing.assert_close(dropped[0], whole[0])
    assert not dropped[1].any()
    torch.testing.assert_close(dropped[2], call(model, torch.tensor([[0, 1], [2, 3], [1, 4]]), [0, 1, 2])[2])


def test_an_infinite_weight_of_a_dropped_row_does_no_harm():
    model = adapted()
    experts = next(m for m in model.modules() if isinstance(m, ALoRAExperts))
    weights = torch.tensor([[0.5, 0.5], [float("inf"), float("nan")]])
    with torch.no_grad(), alora_kernels.route(torch.tensor([0, 1])):
        assert experts(torch.randn(2, 32), torch.tensor([[0, 1], [4, 4]]), weights).isfinite().all()


def test_the_same_expert_twice_and_experts_without_rows():
    model = adapted()
    once = call(model, torch.tensor([[2], [2]]), [0, 1])
    twice = call(model, torch.tensor([[2, 2], [2, 2]]), [0, 1])
    torch.testing.assert_close(twice, 2 * once)
    assert call(model, torch.zeros(0, 2, dtype=torch.long), []).shape == (0, 32)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 4, 4))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"target_parameters": ["experts.up"]}, "'experts.up', and no parameter of the model is called so"),
        (
            {"target_parameters": ["mlp.gate.weight"]},
            "mlp.gate.weight, of target_parameters, belongs to a Qwen3MoeTopK",
        ),
        ({"target_parameters": "experts"}, "a list of names or 'all-experts', got 'experts'"),
        ({"routing": "soft", "tasks": None, "num_experts": 2}, 'routing="soft" has no tasks'),
        ({"layers_to_transform": [0]}, "layers_to_transform is for target_modules"),
        ({"experts_A": "all"}, 'experts_A must be "shared" or "each", got \'all\''),
        ({"experts_B": None}, 'experts_B must be "shared" or "each", got None'),
    ],
)
def test_refused_settings(settings, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        adapted(**settings)


def test_a_model_without_such_experts():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Odd()

    with pytest.raises(ValueError, match="has none of the experts that ALoRA adapts: MixtralExperts"):
        get_peft_model(Plain(), ALoRAConfig(tasks=2, target_parameters="all-experts"))
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj, of target_parameters, belongs to a Odd"):
        get_peft_model(Plain(), ALoRAConfig(tasks=2, target_parameters=["experts.gate_up_proj"]))


def test_a_block_whose_forward_was_replaced_is_refused():
    base = mixture()
    block = base.model.layers[0].mlp
    block.forward = block.forward  # as a kernel of the hub does
    with pytest.raises(ValueError, match="their block, a Qwen3MoeSparseMoeBlock, runs other code than its own"):
        adapted(base)


def test_hooked_and_quantised_experts_are_refused():
    base = mixture()
    base.model.layers[0].mlp.experts.register_forward_pre_hook(lambda *a: None)
    with pytest.raises(ValueError, match="the experts runs? other code"):
        adapted(base)
    base = mixture()
    experts = base.model.layers[1].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*is quantised .*float8_e4m3fn"):
        adapted(base)


def test_experts_split_over_processes_are_refused():
    base = mixture()
    base.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="split over processes"):
        adapted(base)


def test_excluded_experts_stay_out():
    for model in (adapted(exclude_modules=n) for n in (r".*layers\.0\.mlp\.experts.*", ["layers.0.mlp.experts"])):
        assert model.peft_config["default"].target_parameters[0] == "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_adapters_over_a_16_bit_base_are_float32(dtype):
    model = adapted(mixture().to(dtype))
    assert {p.dtype for n, p in model.named_parameters() if "asymlora" in n} == {torch.float32}
    wide = adapted(mixture().to(dtype).float())
    near = logits(wide)
    assert (logits(model).float() - near).norm() < 0.05 * near.norm()


def test_autocast():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = logits(model)
    assert (near.float() - logits(model)).norm() < 0.05 * logits(model).norm()


@pytest.mark.parametrize("training", [False, True])
def test_compiled_in_one_graph_for_all_choices_and_tasks(training):
    torch._dynamo.reset()
    experts = next(m for m in adapted(mixture(num_hidden_layers=1)).modules() if isinstance(m, ALoRAExperts))
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts.train(training), backend=counted, fullgraph=True)
    leaves = [p for p in experts.parameters() if p.requires_grad]
    for rows, graphs in ((6, 1), (6, 1), (9, 2), (13, 2)):  # another length once, then any
        x, weights = torch.randn(rows, 32, requires_grad=training), torch.rand(rows, 2, requires_grad=training)
        ids, tasks = torch.randint(-1, 5, (rows, 2)), torch.randint(-1, 3, (rows,))
        with alora_kernels.route(tasks), torch.set_grad_enabled(training):
            right, found = experts(x, ids, weights), compiled(x, ids, weights)
            torch.testing.assert_close(found, right)
        if training:
            each = [torch.autograd.grad(y.sin().sum(), (x, weights, *leaves)) for y in (found, right)]
            torch.testing.assert_close(*each)
        assert counted.frame_count == graphs


def test_a_mixed_batch_of_a_mixture_on_this_device(device):
    """Values and gradients of a whole model beside those of float64 on the CPU."""
    exact, model = adapted(mixture().double()).double(), adapted(mixture()).to(device)
    ids, losses = tokens(3), []
    for m in (exact, model):
        y = m(input_ids=ids.to(m.device), adapter_names=NAMES).logits
        losses.append(y.double().square().mean())
        losses[-1].backward()
    torch.testing.assert_close(losses[1].cpu(), losses[0], rtol=1e-4, atol=1e-5)
    right = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad.cpu().double(), right[name], rtol=1e-3, atol=1e-5)


def test_other_rows_round_a_mixture_otherwise_and_its_attention_is_adapted_all_the_same(recwarn):
    """How many rows an expert has decides how its product rounds: a row changes a little when another one does."""
    base = mixture(
        hidden_size=256, head_dim=32, num_hidden_layers=4, num_experts=32, num_experts_per_tok=8,
        moe_intermediate_size=256,
    )  # fmt: skip
    x, other = tokens(2, 12), tokens(2, 12)
    other[1] = torch.randint(3, 64, (12,))
    with torch.no_grad():
        assert not torch.equal(base(input_ids=x).logits[0], base(input_ids=other).logits[0])
    model = adapted(base, target_modules=["q_proj", "o_proj"], target_parameters=None)
    assert len(model.targeted_module_names) == 8


def test_target_parameters_alone_bring_no_modules_along(monkeypatch):
    """Not those of PEFT's table of defaults, should the model be in it."""
    monkeypatch.setattr(ALoRAModel, "target_module_mapping", {"mixtral": ["q_proj"]})
    model = adapted(mixture("Mixtral"))
    assert model.targeted_module_names == [] and len(model.targeted_parameter_names) == 4


def after(model: Any, what: str) -> None:
    base = next(m for m in model.modules() if isinstance(m, ALoRAExperts)).base_layer
    if what == "hook":
        base.register_forward_hook(lambda *args: None)
    elif what == "offload":
        cpu_offload(base, execution_device=torch.device("cpu"))
    elif what == "train":
        base.down_proj.requires_grad_()
    else:
        base.to("meta")


@pytest.mark.parametrize(
    ("what", "text"),
    [("hook", "has hooks"), ("offload", "is offloaded"), ("train", "trains, and"), ("move", "on another device")],
)
def test_what_comes_after_the_adapter_is_not_passed_over(what, text):
    model = adapted()
    after(model, what)
    with pytest.raises(ValueError, match=rf"layers\.0\.mlp\.experts .*{text}"):
        model(input_ids=tokens(3), adapter_names=NAMES)
    if what == "train":
        assert logits(model).isfinite().all()  # without gradients nothing is missing


@pytest.mark.parametrize("change", ["subclass", "class"])
def test_experts_of_the_same_name_and_other_code_are_refused(change, monkeypatch):
    base = mixture()
    kind = type(base.model.layers[0].mlp.experts)
    if change == "class":
        monkeypatch.setattr(kind, "forward", lambda self, *args: kind.forward(self, *args) * 2)
    else:
        base.model.layers[0].mlp.experts.__class__ = type(kind.__name__, (kind,), {"__module__": __name__})
    with pytest.raises(ValueError, match="belongs to a Qwen3MoeExperts of other code"):
        adapted(base, target_parameters=["down_proj"])


def test_experts_that_blocks_share_are_refused_and_so_is_merging_into_shared_weights():
    base = mixture()
    first, second = (layer.mlp for layer in base.model.layers)
    second.experts.down_proj = first.experts.down_proj
    model = adapted(deepcopy(base))
    set_task(model, "green")
    before = logits(model, None, tokens(2))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.down_proj is also that of model\.layers\.1\.mlp"):
        model.merge_adapter()
    assert torch.equal(logits(model, None, tokens(2)), before)
    second.experts = first.experts
    with pytest.raises(ValueError, match="belongs to experts that several blocks share"):
        adapted(base)


def test_one_stacked_weight_is_merged_and_the_other_keeps_its_adapters():
    model = adapted()
    config = ALoRAConfig(r=2, tasks=1, target_parameters=["experts.down_proj"], init_weights=False)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    set_task(model, "green")
    alone = deepcopy(model)
    model.merge_adapter(["other"])
    for stack in stacks_of(alone)[1::2]:
        stack.forget("default")  # as a layer, into which another adapter was merged
    torch.testing.assert_close(logits(model, None, tokens(2)), logits(alone, None, tokens(2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "GptOss"])
def test_routers_and_what_is_below_learn_as_over_merged_experts(family):
    """Whatever trains beside the experts, and rows that no expert takes, as the base computes it by itself."""
    model = adapted(mixture(family, "eager"))
    set_task(model, "green")
    merged = deepcopy(model).merge_and_unload()
    merged.requires_grad_(True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in name)
    right = gradients(merged, lambda: merged(input_ids=tokens(3)))
    found = gradients(model, lambda: model(input_ids=tokens(3)))
    assert any("gate.weight" in name or "router.weight" in name for name in found) and len(found) > 10
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, right[name.removeprefix("base_model.model.")], rtol=1e-3, atol=1e-5)


def test_gradients_of_rows_that_no_expert_takes():
    model = adapted(mixture("Qwen3Moe", "eager"))
    set_task(model, "green")
    merged = deepcopy(model).merge_and_unload().model.layers[0].mlp.experts
    experts = next(m for m in model.modules() if isinstance(m, ALoRAExperts))
    ids, found = torch.tensor([[0, 1], [2, 4], [4, 4], [3, 3]]), []
    for module in (experts, merged):
        generator = torch.Generator().manual_seed(0)
        x, weights = (torch.randn(4, n, generator=generator, requires_grad=True) for n in (32, 2))
        y = module(x, ids, weights)
        found.append((y, *torch.autograd.grad(y.pow(2).sum(), (x, weights))))
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-4)


def test_copies_and_pickles_stand_on_weights_of_their_own():
    model = adapted()
    right, copies = logits(model), [deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.data.zero_()
    assert all(torch.equal(logits(copy), right) for copy in copies)


def test_forward_mode_is_refused_not_zero():
    model = adapted(target_modules=["q_proj"])
    set_task(model, "green")
    block = model.base_model.model.model.layers[0]
    ids, weights, x = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2), torch.randn(3, 32)
    for function in (lambda x: block.mlp.experts(x, ids, weights), block.self_attn.q_proj):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(function, (x,), (x,))
