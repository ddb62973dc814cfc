"""Adapters on the experts of a mixture as folders: read, refused, given to stock PEFT, and tasks that come and go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.export import export_lora
from alora_kernels.adapters.import_lora import import_lora
from alora_kernels.adapters.reader import read_adapter
from alora_kernels.adapters.tasks import arrange_tasks, join_adapters, list_tasks
from alora_kernels.adapters.writer import save_adapter
from alora_kernels.analysis.sources import units
from alora_kernels.cli.app import app

from ..support.adapters import PREFIX, change_config, change_weights
from ..support.mixtures import FAMILIES, TASKS, adapted, mixture, tokens

SHARING = [("shared", "each"), ("each", "each"), ("shared", "shared"), ("each", "shared")]
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
EACH, NONE = {"experts_A": "each", "experts_B": "each"}, {"experts_A": "shared", "experts_B": "shared"}


def sharing(choice: tuple[str, str]) -> dict[str, str]:
    return dict(zip(("experts_A", "experts_B"), choice, strict=True))


def saved(path: Path, model: PeftModel) -> Path:
    save_adapter(model, path, save_embedding_layers=False)
    return path


def folder(path: Path, **settings: Any) -> Path:
    return saved(path, adapted(**settings))


@torch.no_grad()
def logits(model: Any, **names: Any) -> torch.Tensor:
    return model(input_ids=tokens(2), **names).logits  # type: ignore[no-any-return]


def assert_same_answers(stock: PeftModel, model: PeftModel, task: str) -> None:
    wanted = logits(model, adapter_names=[task] * 2)
    torch.testing.assert_close(logits(stock), wanted, rtol=1e-4, atol=2e-5)
    base = logits(model, adapter_names=["__base__"] * 2)
    assert float((wanted - base).abs().max()) > 1e-2  # or the comparison would say nothing


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", SHARING)
def test_what_is_read_is_what_was_saved(tmp_path, family, choice):
    model = adapted(mixture(family), **sharing(choice), **ATTENTION)
    for path in (saved(tmp_path / "one", model), tmp_path / "two"):
        model.save_pretrained(tmp_path / "two", save_embedding_layers=False)
        file = read_adapter(path)
        layers = dict(model.base_model.model.named_modules())
        assert {"gate_up_proj", "down_proj", "q_proj", "v_proj"} == {m.rpartition(".")[2] for m in file.shapes}
        assert file.config.stacks == {m for m in file.shapes if "experts" in m} and len(file.config.stacks) == 4
        for module, shape in file.shapes.items():
            a, b = (getattr(layers[module], f"asymlora_{p}")["default"].weight for p in "AB")
            assert (len(TASKS), *shape.a, shape.r, shape.k) == a.shape and (*shape.b, shape.n, shape.r) == b.shape
            assert torch.equal(file.b[module], b) and torch.equal(file.stacks()[module], a)
            assert torch.equal(file.matrices("green")[module], a[1])
            assert file.scaling[module] == 2


def stacked(module: str, part: str, *shape: int) -> Any:
    """Other numbers of this shape in the place of a tensor."""
    return lambda tensors: tensors.update({f"{PREFIX}{module}.asymlora_{part}.weight": torch.ones(*shape)})


@pytest.mark.parametrize(
    ("settings", "change", "why"),
    [
        ({}, stacked(UP, "A", 2, 4, 32), f"{UP}: A is [2, 4, 32]"),
        ({}, stacked(UP, "B", 2, 4, 48, 4), f"{UP}: A is [3, 4, 32] and B [2, 4, 48, 4]"),
        ({}, stacked(UP, "B", 4, 48, 3), f"{UP}: A is [3, 4, 32] and B [4, 48, 3]"),
        (EACH, stacked(UP, "A", 3, 5, 4, 32), f"{UP}: A is [3, 5, 4, 32] and B [4, 48, 4]"),
        (EACH, stacked(UP, "A", 3, 0, 4, 32), f"{UP}: A is [3, 0, 4, 32]"),
        (ATTENTION, stacked("model.layers.0.self_attn.q_proj", "B", 4, 32, 4), "q_proj: A is [3, 4, 32] and B [4, 3"),
        ({}, lambda t: t.pop(f"{PREFIX}{UP}.asymlora_A.weight"), f"{UP} has no A"),
        ({}, lambda t: [t.pop(f"{PREFIX}{UP}.asymlora_{p}.weight") for p in "AB"], f"names {UP}"),
        ({}, lambda t: t[f"{PREFIX}{UP}.asymlora_B.weight"].fill_(float("nan")), UP),
    ],
)
def test_damaged_and_lying_weights_are_refused(tmp_path, settings, change, why):
    path = folder(tmp_path / "one", **settings)
    change_weights(path, change)
    with pytest.raises(AdapterFolderError, match=re.escape(why)):
        read_adapter(path)


@pytest.mark.parametrize(
    ("named", "why"),
    [
        (None, f"{DOWN}: A is [3, 4, 24] and B [4, 32, 4]"),
        ([UP], "A is [3, 4, 24] and B [4, 32, 4]"),
        ("all-experts", "target_parameters must be a list"),
        ([3], "target_parameters must be a list"),
        ({"a": 1}, "target_parameters must be a list"),
        (["mlp.experts.up"], "names mlp.experts.up"),
    ],
)
def test_what_target_parameters_does_not_name_is_no_stack(tmp_path, named, why):
    path = folder(tmp_path / "one")
    change_config(path, target_parameters=named)
    with pytest.raises(AdapterFolderError, match=re.escape(why)):
        read_adapter(path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("choice", SHARING)
@pytest.mark.parametrize("settings", [{}, ATTENTION], ids=["experts", "and attention"])
def test_stock_peft_gives_the_same_logits(tmp_path, family, choice, settings):
    model = adapted(mixture(family), **sharing(choice), **settings)
    report = export_lora(model, tmp_path / "out")
    assert report.experts and report.vllm_command is None and report.sglang_command is None
    for written in report.tasks:
        stock = PeftModel.from_pretrained(mixture(family), written.folder).eval()
        assert_same_answers(stock, model, written.task)
    assert_same_answers(stock.merge_and_unload(), model, written.task)
    if choice == ("shared", "shared"):
        with pytest.raises(AdapterFolderError, match="share A and B, so the folder does not say how many they are"):
            export_lora(saved(tmp_path / "ours", model), tmp_path / "again")
        return
    export_lora(saved(tmp_path / "ours", model), tmp_path / "again")
    for task in TASKS:
        one, other = ((tmp_path / place / task / "adapter_model.safetensors") for place in ("out", "again"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_parameters": ["experts.down_proj"], **ATTENTION},
        {"target_parameters": ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]},
        {"rank_pattern": {"down_proj": 2, "layers.1.mlp.experts.gate_up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
        {"use_rslora": True, "lora_alpha": 7, "rank_pattern": {"gate_up_proj": 9}, **EACH},
        {"rank_pattern": {"q_proj": 7}, **ATTENTION, "experts_A": "each"},
    ],
)
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_stock_peft_with_other_settings(tmp_path, family, settings):
    model = adapted(mixture(family), **settings)
    for written in export_lora(saved(tmp_path / "ours", model), tmp_path / "out").tasks:
        assert_same_answers(PeftModel.from_pretrained(mixture(family), written.folder).eval(), model, written.task)
    again = PeftModel.from_pretrained(mixture(family), tmp_path / "ours").eval()
    assert torch.equal(logits(again, adapter_names=TASKS[:2]), logits(model, adapter_names=TASKS[:2]))


def test_stock_folders_of_parameters_are_refused(tmp_path):
    stock = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    get_peft_model(mixture(), stock).save_pretrained(tmp_path / "stock", save_embedding_layers=False)
    ours = folder(tmp_path / "ours")
    for call in (
        lambda: read_adapter(tmp_path / "stock"),
        lambda: import_lora([tmp_path / "stock"], tmp_path / "out"),
        lambda: join_adapters(ours, tmp_path / "stock", out=tmp_path / "out"),
        lambda: units(tmp_path / "stock"),
    ):
        with pytest.raises(AdapterFolderError, match="target_parameters.*adapters on parameters instead of modules"):
            call()
    assert not (tmp_path / "out").exists()


def test_what_takes_layers_alone_refuses_experts(tmp_path):
    one, two = folder(tmp_path / "one", **NONE), folder(tmp_path / "two", tasks=["grey"], **NONE)
    for call in (lambda: join_adapters(one, two, out=tmp_path / "out"), lambda: units(one)):
        with pytest.raises(AdapterFolderError, match="adapts the experts of a mixture .* takes layers alone"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("choice", SHARING)
def test_tasks_come_and_go(tmp_path, choice):
    model = adapted(**sharing(choice), **ATTENTION)
    path = saved(tmp_path / "one", model)
    arranged = arrange_tasks(path, {"sea": "blue", "red": "red", "new": None}, out=tmp_path / "two")
    assert read_adapter(arranged).config.stacks == read_adapter(path).config.stacks
    loaded = PeftModel.from_pretrained(mixture(), arranged).eval()
    assert torch.equal(logits(loaded, adapter_names=["sea", "red"]), logits(model, adapter_names=["blue", "red"]))
    shapes = {m: a.shape for m, a in read_adapter(path).matrices("red").items()}
    new = read_adapter(arranged).matrices("new")
    assert {m: a.shape for m, a in new.items()} == shapes
    for module, a in new.items():
        assert float(a.abs().max()) <= shapes[module][-1] ** -0.5 and float(a.std()) > 0
        if a.dim() == 3:
            assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize("choice", SHARING)
def test_list_says_what_the_stacked_weights_say(tmp_path, choice):
    path = folder(tmp_path / "one", **sharing(choice), **ATTENTION)
    file, base = read_adapter(path), mixture().double()
    changes = []
    for task in TASKS:
        model = PeftModel.from_pretrained(mixture().double(), arrange_tasks(path, {task: task}, out=tmp_path / task))
        merged = dict(model.merge_and_unload().named_parameters())
        parts = [(merged[name] - before).detach() for name, before in base.named_parameters()]
        once = choice == ("shared", "shared")  # such a folder does not say how many experts there are
        changes.append(torch.cat([(d[0] if once and d.dim() == 3 else d).flatten() for d in parts]))
    assert len(file.config.stacks) == 4
    for task, change, found in zip(TASKS, changes, list_tasks(path), strict=True):
        assert found.norm == pytest.approx(float(change.norm()), rel=1e-5)
        for other, cosine in found.alike.items():
            wanted = torch.cosine_similarity(change, changes[TASKS.index(other)], 0)
            assert cosine == pytest.approx(float(wanted), abs=1e-5), task


def test_commands(tmp_path):
    """What people type, from a folder to stock LoRAs."""
    path = folder(tmp_path / "one", **ATTENTION)
    for words in (
        ["verify", path], ["tasks", path, "list"], ["tasks", path, "rename", "red", "sea", "--out", tmp_path / "two"],
        ["tasks", path, "remove", "red", "--out", tmp_path / "three"],
        ["tasks", path, "add", "law", "--out", tmp_path / "four"], ["export", path, "--out", tmp_path / "stock"],
    ):  # fmt: skip
        found = CliRunner().invoke(app, [str(word) for word in words])
        assert found.exit_code == 0, found.output
    assert "no server was tried" in found.output
    for place, tasks in (("two", "sea green blue"), ("three", "green blue"), ("four", "red green blue law")):
        assert read_adapter(tmp_path / place).tasks == tuple(tasks.split())
    found = CliRunner().invoke(app, ["analyze", str(path)])
    assert found.exit_code and "takes layers alone" in " ".join(found.output.split())
