"""Folders become units with the right names and numbers; what is none of them is refused with what was looked for."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.method import Method
from alora_kernels.analysis.comparison import compare_units
from alora_kernels.analysis.sources import units
from alora_kernels.analysis.table import distinct, places
from alora_kernels.baselines.methods import adapt, save_method
from alora_kernels.text import clipped, printable
from alora_kernels.tuner import ALoRAConfig

from ..support.adapters import CONFIG, PREFIX, WEIGHTS, Mlp, alora, change_config, lora
from ..support.refusals import refused
from .adapters import UP, Q, het, randn, unequal, vera


def unreadable(message, folder):
    refused(message, units, folder, error=AdapterFolderError)


def test_each_task_of_an_alora_folder_is_a_unit(tmp_path):
    a, b = {Q.format(0): randn(2, 3, 8)}, {Q.format(0): randn(6, 3)}
    math, code = units(alora(tmp_path / "adapter", ["math", "code"], a, b))
    assert (math.name, code.name, math.rank, math.base, math.shared) == ("math", "code", 3, "tiny", {"B"})
    assert math.names[1] == "adapter"
    for row, unit in enumerate((math, code)):
        parts, update = unit.read(Q.format(0))
        assert torch.equal(parts["A"], a[Q.format(0)][row]) and torch.equal(parts["B"], b[Q.format(0)])
        assert update is not None and update.s == 1.0 and torch.equal(update.a, parts["A"])


def test_a_lora_folder_is_one_unit_named_after_it(tmp_path):
    a, b = {UP.format(3): randn(4, 8)}, {UP.format(3): randn(6, 4)}
    (unit,) = units(lora(tmp_path / "movie", a, b, s=2))
    assert (unit.name, unit.kind, unit.shared) == ("movie", "LoRA", frozenset())
    assert unit.shapes == {UP.format(3): {"A": (4, 8), "B": (6, 4)}}
    assert unit.read(UP.format(3)).update.s == 2.0
    (same,) = units(str(tmp_path / "movie"))
    assert same.names == unit.names


def test_a_run_of_train_is_named_after_the_run(tmp_path):
    lora(tmp_path / "lora-run" / "adapter", {"up": randn(2, 4)}, {"up": randn(3, 2)})
    assert units(tmp_path / "lora-run")[0].name == "lora-run"


def test_vera_gives_its_two_vectors_and_leaves_projections_alone(tmp_path):
    folder = vera(tmp_path / "v", {"up": torch.full((2,), 0.1)}, {"up": randn(6)})
    (unit,) = units(folder)
    loaded = unit.read("up")
    assert set(loaded.parts) == {"lambda_b", "lambda_d"} and loaded.update is None
    assert unit.shapes["up"] == {"lambda_b": (6,), "lambda_d": (2,)} and unit.rank is None


@pytest.mark.parametrize(("name", "labels"), [("lora-per-task", ["x", "y"]), ("hydralora", ["expert 0", "expert 1"])])
def test_methods_that_peft_does_not_hold(name, labels, tmp_path):
    method = Method(name, tasks=("x", "y"), r=2, num_experts=2, target_modules=("up",), task_type=None)
    model = adapt(Mlp(), method)
    with torch.no_grad():
        model.up.lora_B.normal_()
    for folder in (tmp_path / "run" / "adapter", tmp_path / "alone"):
        save_method(model, folder, method)
    found = units(tmp_path / "run")
    assert [unit.name for unit in found] == [unit.name for unit in units(tmp_path / "alone")] == labels
    assert found[0].names[1] == "run" and found[0].shared == ({"A"} if name == "hydralora" else set())
    for row, unit in enumerate(found):
        parts, update = unit.read("up")
        a = model.up.lora_A if name == "hydralora" else model.up.lora_A[row]
        assert torch.equal(parts["A"], a) and torch.equal(parts["B"], model.up.lora_B[row]) and update.s == 2.0
        assert unit.shapes["up"] == {"A": (2, 8), "B": (16, 2)}
    (tmp_path / "alone" / "method.json").unlink()
    refused("holds neither method.json", units, tmp_path / "alone")
    save_method(model, tmp_path / "alone", replace(method, tasks=("x", "y", "z"), num_experts=3))
    unreadable(f"not what {name} of 3 makes", tmp_path / "alone")


def test_each_expert_of_a_soft_alora_is_a_unit_with_its_row_of_the_router(tmp_path):
    how = {"r": 2, "lora_alpha": 3, "rank_pattern": {"down": 4}, "target_modules": ["up", "down"]}
    config = ALoRAConfig(num_experts=3, routing="soft", **how)
    model = get_peft_model(Mlp(), config)
    with torch.no_grad():
        model.base_model.up.asymlora_B["default"].weight.normal_()
    model.save_pretrained(str(tmp_path / "run" / "adapter"))
    experts = units(tmp_path / "run")
    assert [unit.name for unit in experts] == ["expert 0", "expert 1", "expert 2"]
    assert experts[0].names[1] == "run" and experts[0].shared == {"B"} and experts[0].rank == 4
    assert experts[0].shapes["up"] == {"A": (2, 8), "B": (16, 2), "router": (8,)}
    for row, unit in enumerate(experts):
        layer = model.base_model.up
        parts, update = unit.read("up")
        assert torch.equal(parts["A"], layer.asymlora_A["default"].weight[row])
        assert torch.equal(parts["router"], layer.asymlora_router["default"].weight[row])
        assert torch.equal(update.b, layer.asymlora_B["default"].weight) and update.s == 1.5
        assert unit.read("down").update.s == 0.75
    study = compare_units(experts)
    assert {row[3] for row in study.similarity} == {"A", "router"}
    assert any("soft ALoRA folder share one B" in note for note in study.notes)
    assert any("giving it all the weight" in note for note in study.notes)
    change_config(tmp_path / "run" / "adapter", num_experts=2)
    unreadable("not what 2 experts of rank", tmp_path / "run")


def test_a_federated_run_is_a_unit_per_client(tmp_path):
    for client, r in (("nyt", 2), ("amazon", 4)):
        folder = tmp_path / "run" / "clients" / "abc" / client / "adapter"
        alora(folder, ["client"], {"up": randn(1, r, 8)}, {"up": randn(6, r)})
    (tmp_path / "run" / "clients" / "abc" / "late").mkdir()
    amazon, late, nyt = units(tmp_path / "run")
    assert [amazon.name, nyt.name, amazon.rank, nyt.rank] == ["amazon", "nyt", 4, 2]
    assert amazon.shared == frozenset() and not late.shapes and "final.safetensors" in late.why
    assert units(tmp_path / "run" / "clients" / "abc" / "nyt")[0].name == "nyt"
    unreadable("late has neither adapter", tmp_path / "run" / "clients" / "abc" / "late")


def test_clients_of_unequal_rank(tmp_path):
    folder = tmp_path / "run" / "clients" / "abc"
    unequal(folder / "one", het("layer.0.up", 2))
    unequal(folder / "two", het("layer.0.up", 4, seed=10))
    one, two = units(tmp_path / "run")
    assert set(one.shapes) == {"layer.0.up"} and two.rank == 4
    parts, update = two.read("layer.0.up")
    assert torch.allclose(update.a, (parts["M"].double() @ parts["A"].double()))
    assert torch.allclose(update.b, parts["B"].double() + parts["B2"].double() @ parts["B1"].double())
    assert update.s is None  # files of earlier versions do not say it
    unequal(folder / "three", het("layer.0.up", 2), scaling="2.0")
    assert units(folder / "three")[0].read("layer.0.up").update.s == 2.0
    unequal(folder / "four", het("layer.0.up", 2), scaling="two")
    unreadable("says s is 'two'", folder / "four")


def test_what_is_none_of_these_is_refused_with_what_was_sought(tmp_path):
    unreadable(r"no such folder: give an adapter folder .*federated run", tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    unreadable("is a file", tmp_path / "file")
    lora(tmp_path / "a" / "movie", {"up": randn(2, 4)}, {"up": randn(3, 2)})
    unreadable(r"none of what can be looked into.*give its subfolders: movie", tmp_path / "a")
    (tmp_path / "run" / "clients" / "abc" / "late").mkdir(parents=True)
    unreadable("no client has finished", tmp_path / "run")
    (tmp_path / "prompt").mkdir()
    (tmp_path / "prompt" / CONFIG).write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    (tmp_path / "prompt" / WEIGHTS).write_bytes(b"")
    unreadable("only ASYMLORA", tmp_path / "prompt")


def test_numbers_that_are_not_finite_are_named_by_their_layer(tmp_path):
    bad = randn(2, 4)
    bad[0, 0] = torch.nan
    some = {UP.format(0): randn(2, 4), UP.format(1): bad}
    folder = lora(tmp_path / "l", some, {m: randn(3, 2) for m in some})
    unreadable(r"layers\.1\.mlp\.up_proj holds numbers that are not finite", folder)
    many = {UP.format(i): bad for i in range(7)}
    folder = lora(tmp_path / "m", many, {m: randn(3, 2) for m in many})
    unreadable(r"layers\.0.*layers\.4\.mlp\.up_proj and 2 more hold numbers", folder)
    folder = vera(tmp_path / "v", {"up": randn(2)}, {"up": torch.tensor([1.0, torch.inf])})
    unreadable("lambda_b of up holds numbers that are not finite", folder)
    parts = het("up", 2)
    parts["up.M"][0, 0] = torch.nan
    unreadable("M of up holds numbers", unequal(tmp_path / "clients" / "abc" / "one", parts))


def test_damaged_files_are_refused(tmp_path):
    folder = vera(tmp_path / "v", {"up": randn(2)}, {"up": randn(3)})
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    unreadable("does not read", folder)
    save_file({"other": randn(2)}, folder / WEIGHTS)
    unreadable("nothing that can be compared", folder)
    save_file({f"{PREFIX}up.vera_lambda_b": randn(2, 2)}, folder / WEIGHTS)
    unreadable(r"lambda_b has shape \[2, 2\]", folder)
    client = unequal(tmp_path / "clients" / "abc" / "one", het("up", 2), method="fedit")
    unreadable("of the method 'fedit'", client)
    parts = het("up", 2)
    unequal(client, parts | {"up.M": randn(4, 2)})
    unreadable("do not fit each other", client)
    unequal(client, {key: value for key, value in parts.items() if key != "up.B1"})
    unreadable("up must have A, M, B1, B2, B", client)
    data = bytearray((client / "final.safetensors").read_bytes())
    data[-2] ^= 0xFF
    (client / "final.safetensors").write_bytes(data)
    unreadable("checksum", client)


def test_a_file_that_changes_between_check_and_use_is_refused(tmp_path):
    folder = lora(tmp_path / "l", {"up": randn(2, 4)}, {"up": randn(3, 2)})
    (unit,) = units(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {f"{PREFIX}up.lora_A.weight": randn(2, 4, seed=1)}, folder / "new")
    os.replace(folder / "new", folder / WEIGHTS)
    refused("changed while it was read", unit.read, "up", error=AdapterFolderError)


def test_names_from_strangers_stay_on_one_line(tmp_path):
    (unit, _) = units(alora(tmp_path / "a", ["x\x1b[2J\ny", "ok"], {"up": randn(2, 2, 4)}, {"up": randn(3, 2)}))
    assert unit.name == "x?[2J y"
    assert len(printable("a" * 1000, 256)) == 256
    assert clipped("sentiment-of-movies", 9) == "sent…vies" and len(clipped("abcdefghij", 4)) == 4


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        ([("math", "x"), ("code", "x")], ["math", "code"]),
        ([("adapter", "one", "runs"), ("adapter", "two", "runs")], ["one/adapter", "two/adapter"]),
        ([("tv", "seed-0", "fedit"), ("tv", "seed-0", "fedsa"), ("nyt", "x")], ["fedit/tv", "fedsa/tv", "nyt"]),
        ([("m", "a", "x"), ("m", "a", "y"), ("m", "b", "x")], ["x/a/m", "y/a/m", "x/b/m"]),
        ([("m",), ("m",)], ["m", "m (2)"]),
    ],
)
def test_labels_are_short_and_distinct(paths, labels):
    assert distinct(paths) == labels


def test_layers_and_kinds():
    names = [UP.format(10), UP.format(2), Q.format(2), "lm_head"]
    found = places(names)
    assert list(found) == [UP.format(2), Q.format(2), UP.format(10), "lm_head"]
    assert found[UP.format(10)] == (10, "up_proj") and found["lm_head"] == (None, "lm_head")
    bert = places(["layer.0.attention.output.dense", "layer.0.output.dense", "layer.0.intermediate.dense"])
    assert {place.kind for place in bert.values()} == {"attention.output.dense", "output.dense", "intermediate.dense"}
    experts = places([f"layers.4.mlp.experts.{i}.w1" for i in range(3)])
    assert {tuple(place) for place in experts.values()} == {(4, "w1")}
