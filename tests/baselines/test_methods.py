"""All methods through one call: the same layers, the same head, the same data, adapters that train.

Their parameters counted before anything is built; their folders, which give the same answers again or say what to do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainingArguments

from alora_kernels import route
from alora_kernels.adapters.method import METHODS, ROUTED, SETTINGS, STATE, Method, read_method
from alora_kernels.baselines.methods import (
    adapt,
    base_alone,
    load_method,
    parameters_of,
    rank_for,
    save_method,
    target_shapes,
    tasks_of,
    trainable_parameters,
    trained,
)
from alora_kernels.modules.adapter import AdaptedLinear
from alora_kernels.training import ALoRATrainer
from alora_kernels.tuner import ALoRAConfig
from tests.support.refusals import refused
from tests.support.tiny import bert, gpt2, llama, logits, tokens

TASKS = ("math", "code", "law")
PLAIN = ("lora-per-task", "hydralora")


def method(name: str, **changes: Any) -> Method:
    return Method(name, **{"tasks": TASKS, "r": 4, "num_experts": 2, **changes})


def adapted(name: str, base: Any = None, *, zero_b: bool = False, **changes: Any) -> Any:
    """A model of one method; its B are not zero, so that adapters do something."""
    torch.manual_seed(5)
    model = adapt(llama() if base is None else base, method(name, **changes)).eval()
    if not zero_b:
        with torch.no_grad():
            for key, parameter in trained(model).items():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
    return model


def adapted_layers(model: nn.Module) -> set[str]:
    prefix = "base_model.model." if isinstance(model, PeftModel) else ""
    return {
        name.removeprefix(prefix)
        for name, m in model.named_modules()
        if isinstance(m, AdaptedLinear | BaseTunerLayer) and name != "base_model"
    }


def answers(model: nn.Module, ids: list[int] | None = None) -> torch.Tensor:
    with route(torch.tensor(ids or [0, 1, 2, -1])):
        return logits(model, tokens(4))


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
    args = TrainingArguments(output_dir=str(folder), **options)
    ALoRATrainer(model=model, args=args, train_dataset=rows, padding_free=False).train()  # bits are compared
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


def test_counts_by_hand():
    one = [(10, 7)]
    want = {"alora": 3 * 40 + 28, "alora-soft": 2 * 40 + 28 + 20, "lora": 68, "lora-per-task": 3 * 68,
            "hydralora": 40 + 2 * 28 + 20}  # fmt: skip
    for name, number in want.items():
        assert parameters_of(name, 4, one, tasks=3, num_experts=2) == number
        assert parameters_of(name, 4, one * 5, tasks=3, num_experts=2) == 5 * number


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(METHODS)),
    st.integers(1, 64),
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_no_rank_is_nearer(name, r, shapes, tasks, experts):
    def off(rank: int) -> int:
        sizes = {"tasks": tasks, "num_experts": experts}
        return abs(parameters_of(name, rank, shapes, **sizes) - parameters_of("alora", r, shapes, **sizes))

    try:
        chosen = rank_for(name, r, shapes, tasks=tasks, num_experts=experts)
    except ValueError:
        assert off(0) <= off(1)
        return
    assert chosen >= 1
    best = min(range(64 * 10 + 1), key=lambda rank: (off(rank), rank))
    assert chosen == best
    if name == "alora":
        assert chosen == r


def test_a_budget_below_rank_one_says_which_r_would_do():
    wide = [(10, 1000)]
    with pytest.raises(ValueError, match=r"lora-per-task needs 9090 .* r=1 and 9 tasks: give r of at least (\d+)") as e:
        rank_for("lora-per-task", 1, wide, tasks=9, num_experts=2)
    enough = int(str(e.value).split("at least ")[1].split(",")[0])
    assert rank_for("lora-per-task", enough, wide, tasks=9, num_experts=2) == 1
    refused("budget", rank_for, "lora-per-task", enough - 1, wide, tasks=9, num_experts=2)
    refused("no layer is adapted", rank_for, "lora", 1, [], tasks=9, num_experts=2)


def test_importing_the_budget_imports_nothing_heavy():
    code = "import sys, alora_kernels.adapters.method; print({'torch', 'peft', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded(name, tmp_path):
    model = adapted(name, modules_to_save=("lm_head",))
    with torch.no_grad():
        next(p for key, p in trained(model).items() if "lm_head" in key).add_(0.1)
    want = answers(model)
    save_method(model, tmp_path, method(name, modules_to_save=("lm_head",)), {"budget": "rank"})
    assert json.loads((tmp_path / SETTINGS).read_text())["record"] == {"budget": "rank"}
    assert read_method(tmp_path) == method(name, modules_to_save=("lm_head",))
    assert torch.equal(answers(load_method(llama(), tmp_path).eval()), want)
    assert (tmp_path / STATE).exists() == (name in PLAIN)


def test_another_method_in_the_same_folder_replaces_the_first(tmp_path):
    for name in ("alora", "hydralora", "lora", "lora-per-task"):
        model = adapted(name)
        save_method(model, tmp_path, method(name))
        assert {p.name for p in tmp_path.glob("*.safetensors")} == {
            STATE if name in PLAIN else "adapter_model.safetensors"
        }
        assert torch.equal(answers(load_method(llama(), tmp_path).eval()), answers(model))


def test_a_folder_of_peft_without_our_settings_loads(tmp_path):
    model = adapted("lora")
    model.save_pretrained(tmp_path)
    assert read_method(tmp_path) is None
    assert torch.equal(answers(load_method(llama(), tmp_path).eval()), answers(model))


@pytest.mark.parametrize("name", PLAIN)
def test_bad_folders(name, tmp_path):
    refused(r"holds neither method.json nor adapter_config.json", load_method, llama(), tmp_path)
    save_method(adapted(name), tmp_path, method(name))
    with pytest.raises(ValueError, match=r"has no model.layers.1.* which this model needs: load it on the base"):
        one_layer = adapted(name, llama(layers=1))
        save_method(one_layer, tmp_path / "small", method(name))
        load_method(llama(), tmp_path / "small")
    refused(r"has model.layers.1.* more that this model has no place for", load_method, llama(layers=1), tmp_path)
    with pytest.raises(ValueError, match=r"is \(.*\) in the file but \(.*\) here; load it on the base"):
        load_method(llama(intermediate_size=40), tmp_path)
    whole = (tmp_path / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(whole[:100])
    refused("does not read", load_method, llama(), tmp_path)
    (tmp_path / STATE).unlink()
    refused("is missing: method.json alone is no adapter", load_method, llama(), tmp_path)
    for text in ("{", "[]", "{}", '{"settings": {"name": "vera"}}', '{"settings": {"nam": 1}}', '{"settings": []}'):
        (tmp_path / SETTINGS).write_text(text)
        refused("is not what `alora train` writes", load_method, llama(), tmp_path)


def test_a_refused_load_gives_the_base_back(tmp_path):
    save_method(adapted("hydralora"), tmp_path, method("hydralora"))
    base = llama(layers=1)
    weight, want = base.model.layers[0].mlp.up_proj.weight, answers(base)
    refused("no place for", load_method, base, tmp_path)
    assert not adapted_layers(base) and base.model.layers[0].mlp.up_proj.weight is weight
    assert torch.equal(answers(base), want)
    base.save_pretrained(tmp_path / "base")  # all of it, not only what would have trained
    assert torch.equal(answers(type(base).from_pretrained(tmp_path / "base")), want)
    assert adapted_layers(adapt(base, method("lora")))


@pytest.mark.parametrize("name", METHODS)
def test_names_that_match_nothing_are_told_once(name, recwarn):
    asked = method(name, target_modules=("q_proj", "v_prj"))
    model = llama()
    target_shapes(model, asked)
    adapt(model, asked)
    said = [str(one.message) for one in recwarn if "target_modules" in str(one.message)]
    assert said == ["target_modules: no module of this model is called v_prj (did you mean v_proj?)"]
