"""All methods through one call: the same layers, the same head, the same data, adapters that train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainingArguments

from alora_kernels.adapters.method import METHODS, ROUTED, Method
from alora_kernels.baselines.methods import (
    adapt,
    base_alone,
    parameters_of,
    target_shapes,
    tasks_of,
    trainable_parameters,
    trained,
)
from alora_kernels.modules.adapter import AdaptedLinear
from alora_kernels.training import ALoRATrainer
from alora_kernels.tuner import ALoRAConfig
from tests.baselines.adaptations import PLAIN, TASKS, adapted, adapted_layers, answers, method
from tests.support.refusals import refused
from tests.support.tiny import bert, gpt2, llama, logits, tokens


@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), r".*\.1\.mlp\.(up|down)_proj", None])
def test_the_same_targets_mean_the_same_layers_for_every_method(targets):
    found = {name: adapted_layers(adapted(name, target_modules=targets)) for name in METHODS}
    assert found["lora"]
    assert all(layers == found["lora"] for layers in found.values())


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_an_encoders_head_is_trained_alike(task_type):
    heads = {}
    for name in METHODS:
        model = adapted(name, bert(), target_modules=("query", "value"), task_type=task_type)
        heads[name] = sorted(p.numel() for key, p in trained(model).items() if "classifier" in key)
    assert bool(heads["lora"]) == (task_type == "SEQ_CLS")
    assert all(head == heads["lora"] for head in heads.values())
    layers = {n: adapted_layers(adapted(n, bert(), task_type=task_type)) for n in METHODS}
    assert all(found == layers["lora"] for found in layers.values())


def test_further_modules_are_trained_in_full():
    for name in METHODS:
        model = adapted(name, target_modules=("q_proj",), modules_to_save=("lm_head",))
        assert sum(p.numel() for key, p in trained(model).items() if "lm_head" in key) == 64 * 32, name


@pytest.mark.parametrize("routing", ["task", "soft"])
def test_alora_is_what_peft_makes_of_our_config(routing):
    torch.manual_seed(5)
    kind = {"tasks": list(TASKS)} if routing == "task" else {"num_experts": 2}
    config = ALoRAConfig(r=4, routing=routing, target_modules="all-linear", task_type="CAUSAL_LM", **kind)
    want = get_peft_model(llama(), config).state_dict()
    got = adapted("alora" if routing == "task" else "alora-soft", zero_b=True).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_begins_as_its_base_and_only_adapters_train(name):
    base = answers(llama())
    model = adapted(name, zero_b=True)
    torch.testing.assert_close(answers(model), base)
    assert all("lora_" in key or "router" in key for key in trained(model))
    model = adapted(name)
    assert not torch.allclose(answers(model)[:3], base[:3], atol=1e-3)
    with base_alone(model):
        torch.testing.assert_close(answers(model), base)
    assert not torch.allclose(answers(model)[:3], base[:3], atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_ids_matter_to_routed_methods_and_are_harmless_to_the_others(name):
    model = adapted(name)
    one, other = answers(model, [0, 1, 2, -1]), answers(model, [1, 1, 2, -1])
    assert torch.equal(one, other) == (name not in ROUTED)
    assert tasks_of(model) == (TASKS if name in ROUTED else ())
    if name not in ROUTED:
        assert torch.equal(logits(model, tokens(4)), one)


def test_a_lora_per_task_is_stock_lora_for_each_task():
    model = adapted("lora-per-task")
    for index in range(3):
        stock = adapted("lora")
        modules = dict(stock.get_base_model().named_modules())
        for key, layer in model.named_modules():
            if isinstance(layer, AdaptedLinear):
                modules[key].lora_A["default"].weight.data.copy_(layer.lora_A[index])
                modules[key].lora_B["default"].weight.data.copy_(layer.lora_B[index])
        torch.testing.assert_close(answers(model, [index] * 4), answers(stock))


def test_adapters_are_float32_over_a_16_bit_base():
    for name in METHODS:
        model = adapted(name, llama().bfloat16())
        assert {p.dtype for p in trained(model).values()} == {torch.float32}, name
        assert answers(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_those_of_the_model(name):
    for base in (llama, gpt2) if name not in PLAIN else (llama,):
        model = base()
        shapes = target_shapes(model, method(name))
        count = parameters_of(name, 4, shapes, tasks=3, num_experts=2)
        assert trainable_parameters(adapt(model, method(name))) == count


def fitted(name: str, folder: Path, rows: Dataset, **changes) -> dict[str, torch.Tensor]:
    """What trained, after three steps."""
    options = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no",
               "report_to": "none", "disable_tqdm": True, "use_cpu": True, "weight_decay": 0.1, **changes}  # fmt: skip
    model = adapted(name, lora_dropout=0.2)
    ALoRATrainer(model=model, args=TrainingArguments(output_dir=str(folder), **options), train_dataset=rows).train()
    return {key: p.detach().clone() for key, p in trained(model).items()}


def examples(names: tuple[str, ...]) -> Dataset:
    prompts = [[5 + i, 7, 9 + i, 11] for i in range(12)]
    labels = [[-100, -100, -100, row[-1]] for row in prompts]
    tasks = [names[i % len(names)] for i in range(12)]
    return Dataset.from_dict({"input_ids": prompts, "labels": labels, "task": tasks})


@pytest.mark.parametrize("name", METHODS)
def test_gradient_checkpointing_changes_nothing(name, tmp_path):
    plain, recomputed = (fitted(name, tmp_path, examples(TASKS), gradient_checkpointing=on) for on in (False, True))
    before = {key: p.detach() for key, p in trained(adapted(name, lora_dropout=0.2)).items()}
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)
    assert all(not torch.equal(plain[key], before[key]) for key in plain)


def test_a_task_that_no_batch_holds_keeps_its_own_a_and_b(tmp_path):
    before = {key: p.detach() for key, p in trained(adapted("lora-per-task", lora_dropout=0.2)).items()}
    for key, value in fitted("lora-per-task", tmp_path, examples(("math", "law"))).items():
        assert [torch.equal(value[i], before[key][i]) for i in range(3)] == [False, True, False], key


@pytest.mark.parametrize("name", PLAIN)
def test_what_cannot_be_replaced_is_named_and_the_model_left_alone(name):
    refused(rf"h.0.attn.c_attn is a Conv1D: {name} replaces plain nn.Linear .* use alora", adapt, gpt2(), method(name))
    refused("matches no module of this model", adapt, llama(), method(name, target_modules=("query",)))
    refused("embed_tokens is an Embedding", adapt, llama(), method(name, target_modules=("embed_tokens",)))
    with pytest.raises(ValueError, match=r"lm_head shares its weights with model.embed_tokens.weight, which would be"):
        adapt(llama(tie_word_embeddings=True), method(name, modules_to_save=("lm_head",)))
    hooked = llama()
    hooked.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: None)
    refused("up_proj is a Linear with hooks", adapt, hooked, method(name))
    assert not adapted_layers(hooked) and all(p.requires_grad for p in hooked.parameters())


def test_adapters_do_not_stack():
    for first, second in (("hydralora", "lora"), ("lora", "hydralora"), ("lora-per-task", "alora")):
        refused("has adapters already: load the base anew", adapt, adapted(first), method(second))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vera"}, "method: must be one of alora, alora-soft, lora, lora-per-task, hydralora, got 'vera'"),
        ({"r": 0}, "r: must be a whole number >= 1"),
        ({"num_experts": 0}, "num_experts: must be a whole number >= 1"),
        ({"lora_dropout": 1.5}, r"lora_dropout: must be in \[0, 1\)"),
        ({"tasks": ()}, "needs at least one task"),
        ({"tasks": ("a", "a")}, "unique"),
    ],
)
def test_bad_methods(changes, message):
    refused(message, Method, **{"name": "lora-per-task", "tasks": ("a", "b"), **changes})
