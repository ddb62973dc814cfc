"""Tasks of a model in memory: one more makes room for itself, some train and the others stay to the bit."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments

from alora_kernels import add_task, set_task, train_only
from alora_kernels.adapters import tasks as saved
from alora_kernels.adapters.writer import save_adapter
from alora_kernels.training import ALoRATrainer

from ..support import tiny
from ..support.tiny import adapted, layers_of, logits, tokens
from ..support.trainers import peft_model, rows


def matrices(model: Any, part: str = "asymlora_A") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if part in name}


def moved(before: dict[str, torch.Tensor], model: Any) -> set[int]:
    """The tasks of which some A is no longer what it was."""
    now = matrices(model)
    return {i for name, a in before.items() for i in range(len(a)) if not torch.equal(a[i], now[name][i])}


def trained(tmp_path: Any, model: Any, dataset: Any, steps: int = 3, **options: Any) -> ALoRATrainer:
    settings = {"weight_decay": 0.3, "learning_rate": 0.05, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings |= {"max_steps": steps, "per_device_train_batch_size": 6, "save_strategy": "no"}
    keep = {k: options.pop(k) for k in ("keep_absent_tasks",) if k in options}
    args = TrainingArguments(str(tmp_path), **(settings | options))
    return ALoRATrainer(model=model, args=args, train_dataset=dataset, **keep)


def filled(**options: Any) -> Any:
    """A model whose B is not zero, so that every A has a gradient."""
    model = peft_model(**options)
    torch.manual_seed(3)
    for layer in layers_of(model):
        torch.nn.init.normal_(layer.asymlora_B["default"].weight, std=0.1)
    return model


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("like", [None, "code"])
def test_a_new_task_is_that_of_the_saved_adapter_and_the_others_stay(tmp_path, like):
    model, ids = adapted(), tokens(3)
    model.peft_config["default"].base_model_name_or_path = None
    save_adapter(model, tmp_path / "two", save_embedding_layers=False)
    before = logits(model, ids, adapter_names=["math", "code", "__base__"])
    three = {"math": "math", "code": "code", "law": like}
    saved.arrange_tasks(tmp_path / "two", three, out=tmp_path / "three")
    add_task(model, "law", like=like)
    assert torch.equal(logits(model, ids, adapter_names=["math", "code", "__base__"]), before)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "three").eval()
    assert model.peft_config["default"].tasks == loaded.peft_config["default"].tasks == ["math", "code", "law"]
    new = logits(model, ids, adapter_names=["law"] * 3)
    assert torch.equal(new, logits(loaded, ids, adapter_names=["law"] * 3))
    assert torch.equal(new[1], before[1]) == (like == "code")
    set_task(model, "law")
    assert torch.equal(logits(model, ids), new)
    save_adapter(model, tmp_path / "again", save_embedding_layers=False)
    assert saved.read_adapter(tmp_path / "again").tasks == ("math", "code", "law")


@pytest.mark.parametrize("b", [False, True])
def test_others_stay_to_the_bit_whatever_is_in_the_batch(tmp_path, b):
    """Weight decay, and momentum of a training before it, would move them."""
    model = filled()
    trained(tmp_path, model, rows(30), steps=2).train()
    before, shared = matrices(model), matrices(model, "asymlora_B")
    train_only(model, ["next"], b=b)
    trained(tmp_path, model, rows(30)).train()
    assert moved(before, model) == {1}
    assert all(torch.equal(old, matrices(model, "asymlora_B")[name]) for name, old in shared.items()) != b
    train_only(model, None)
    trained(tmp_path, model, rows(30), steps=1).train()
    assert moved(before, model) == {0, 1, 2}


def test_the_gradient_of_trained_tasks_is_that_without_a_choice():
    torch.manual_seed(0)
    model, ids, names = adapted().train(), tokens(4), ["math", "code", "code", "math"]
    whole = deepcopy(model)
    train_only(model, ["code"], b=True)
    for each in (model, whole):
        each(input_ids=ids, labels=ids, adapter_names=names).loss.backward()
    found, wanted = tiny.adapter_grads(model), tiny.adapter_grads(whole)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        if "asymlora_A" in name:
            assert torch.equal(grad[1], wanted[name][1]) and not grad[0].any() and wanted[name][0].any()
        else:
            assert torch.equal(grad, wanted[name])


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    found = []
    for stops in ([], [2]):
        for number, stop in enumerate([*stops, None]):
            model = filled()
            before = matrices(model)
            train_only(model, ["zero"])
            saving = {"save_strategy": "steps", "save_steps": 2}
            trainer = trained(tmp_path / str(len(stops)), model, rows(30), steps=4, **saving)
            if stop:
                trainer.add_callback(StopAfter(stop))
            trainer.train(resume_from_checkpoint=number > 0)
        assert trainer.state.global_step == 4 and moved(before, model) == {2}
        assert not any(p.requires_grad for name, p in model.named_parameters() if "asymlora_B" in name)
        found.append(matrices(model))
    tiny.assert_same(*found)


def test_a_frozen_b_stays_frozen_when_adapters_are_switched(tmp_path):
    model = adapted()
    train_only(model, ["math"])
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    model.set_requires_grad("default")
    copy = deepcopy(model)
    for each in (model, copy):
        trains = {n.split("asymlora_")[1][0] for n, p in each.named_parameters() if p.requires_grad}
        assert trains == {"A"}
    model.add_adapter("other", tiny.config(tasks=["law"]))
    model.set_adapter("other")
    assert {p.requires_grad for n, p in model.named_parameters() if "B.other" in n} == {True}
    model.delete_adapter("default")
    train_only(model, ["law"])
    assert all("default" not in layer.asymlora_trained for layer in layers_of(model))


def test_checkpointed_segments_leave_the_others_too(tmp_path):
    model = filled()
    before = matrices(model)
    train_only(model, ["copy"])
    trained(tmp_path, model, rows(30), gradient_checkpointing=True).train()
    assert moved(before, model) == {0}


def test_what_would_move_the_others_is_refused(tmp_path):
    model = filled()
    train_only(model, ["copy"])
    with pytest.raises(ValueError, match="train_only with keep_absent_tasks=False: tasks that train_only leaves out"):
        trained(tmp_path, model, rows(30), keep_absent_tasks=False).train()


def test_refusals():
    model = adapted()
    for call, message in (
        (lambda: train_only(model, ["maths"]), r"unknown task 'maths': did you mean math\?"),
        (lambda: train_only(model, []), "a list with a name or more"),
        (lambda: train_only(model, "math"), "a list with a name or more"),
        (
            lambda: train_only(model, ["math"], adapter_name="x"),
            "this needs one adapter 'x' that picks by task, and the model has default",
        ),
        (lambda: train_only(adapted(routing="soft"), ["math"]), "soft routing"),
        (lambda: train_only(tiny.llama(), ["math"]), "the model has none"),
        (lambda: add_task(model, "math"), "task names must be unique"),
        (lambda: add_task(model, "law", like="x"), "unknown task 'x'"),
        (
            lambda: train_only(adapted(modules_to_save=["lm_head"], target_modules=["q_proj"]), ["math"]),
            "lm_head trains",
        ),
        (lambda: train_only(adapted(bias="all"), ["math"]), "bias='all' trains in full"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    train_only(adapted(modules_to_save=["lm_head"], target_modules=["q_proj"]), ["math"], b=True)
    set_task(model, "math")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        add_task(model, "law")
