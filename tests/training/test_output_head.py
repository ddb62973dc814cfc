"""An output layer is asked by position where that is proven to be the same, adapted or not; else all is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from alora_kernels import FusedALoRALinear, route
from alora_kernels.routing import ConstantRouting, PickedRouting, Routing
from alora_kernels.training import chunked_loss
from alora_kernels.training.chunked_loss import chunked_cross_entropy
from alora_kernels.training.loss import ModelLoss, row_losses
from alora_kernels.training.tasks import batch_routing
from alora_kernels.tuner import ALoRAConfig
from tests.support.trainers import texts, trainer_on, two_processes
from tests.training.test_chunked_loss import VOCABULARY, assert_same, batch_of, learned, model_of, scored

TASKS = ["a", "b", "c"]
IDS = {"row": torch.tensor([0, 2, 1, 0]), "token": torch.arange(36).view(4, 9) % 4 - 1}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK", 5)


def adapted(base: nn.Module, **settings: Any) -> Any:
    """An adapted model whose adapters do something."""
    config = settings.pop("config", ALoRAConfig)
    model = get_peft_model(base, config(r=2, task_type=TaskType.CAUSAL_LM, **settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lm_head.weight" not in name:
            nn.init.normal_(parameter, 0, 0.3)
    return model.eval()


def with_lm_head(kind: str) -> Any:
    """A model with one kind of trained output layer."""
    base = model_of("llama, tied" if kind == "tied and trained" else "llama")
    if kind == "alora":
        return adapted(base, tasks=TASKS, target_modules=["q_proj", "lm_head"])
    if kind == "alora, two adapters":
        model = adapted(base, tasks=TASKS, target_modules=["q_proj", "lm_head"])
        model.add_adapter("other", ALoRAConfig(r=3, num_experts=2, routing="soft", target_modules=["lm_head"]))
        model.base_model.set_adapter(["default", "other"])
        return model
    if kind == "lora":
        return adapted(base, config=LoraConfig, target_modules=["q_proj", "lm_head"], lora_dropout=0.5)
    if kind == "dora":
        return adapted(base, config=LoraConfig, target_modules=["q_proj", "lm_head"], use_dora=True)
    if kind == "saved module":
        return adapted(base, tasks=TASKS, target_modules=["q_proj"], modules_to_save=["lm_head"])
    if kind == "drop-in":
        base.lm_head = FusedALoRALinear.from_linear(base.lm_head, 2, tasks=TASKS)
        nn.init.normal_(base.lm_head.lora_B)
    return base


@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("kind", [
    "alora", "alora, two adapters", "lora", "dora", "saved module", "drop-in", "trained", "tied and trained",
])  # fmt: skip
def test_adapters_of_the_output_layer_are_asked_for_the_right_rows(kind, ids):
    model, batch = with_lm_head(kind), batch_of()

    def routed(few: dict[str, Tensor]) -> Any:
        with route(few["task_ids"]):
            return model(**{k: v for k, v in few.items() if k != "task_ids"})

    loss = ModelLoss(learned(model_of("llama"), batch).rules)
    loss.learn(routed, batch | {"task_ids": IDS[ids]}, model=model)
    assert loss.whole_because == ""
    with route(IDS[ids]):
        assert_same(loss, model, batch, 0.1)


def test_ids_of_picked_rows():
    rows, leading = torch.tensor([5, 0, 2]), torch.Size([2, 3])
    assert PickedRouting(Routing(torch.tensor([7, 8])), leading, rows).task_ids.tolist() == [8, 7, 7]
    assert PickedRouting(Routing(torch.arange(6).view(2, 3)), leading, rows).task_ids.tolist() == [5, 0, 2]
    assert PickedRouting(ConstantRouting(4), leading, rows).task_ids.tolist() == [4, 4, 4]
    tables = {"one": ("a", "b"), "other": ("b",)}
    named = PickedRouting(batch_routing(torch.tensor([0, 1]), ("a", "b"), tables), leading, rows)
    assert named.for_tasks(("a", "b")).task_ids.tolist() == [1, 0, 0]
    assert named.for_tasks(("b",)).task_ids.tolist() == [0, -1, -1]
    with pytest.raises(ValueError, match="fit neither the batch nor the tokens"):
        PickedRouting(Routing(torch.tensor([0, 1, 2])), leading, rows)


class Doubled(tf.LlamaForCausalLM):
    """Does to its logits what no config tells."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = 2 * outputs.logits
        if labels is not None:
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=VOCABULARY)
        return outputs


class Sharpened(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Around(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, **batch: Any) -> Any:
        return self.inside(**batch)


def hooked() -> Any:
    model = model_of("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    return model


def replaced() -> Any:
    model = model_of("llama")
    model.lm_head.forward = model.lm_head.forward
    return model


def of_another_kind() -> Any:
    model = model_of("llama")
    model.lm_head.__class__ = Sharpened
    return model


def doubled() -> Any:
    model = model_of("llama")
    model.__class__ = Doubled
    return model


def capped_in_large_logits() -> Any:
    """The config names a cap that the class does not have, and the logits are far below it."""
    model = model_of("llama")
    model.config.final_logit_softcapping = 300.0
    return model


@pytest.mark.parametrize(("make", "reason"), [
    (hooked, "hooks"), (replaced, "somebody replaced"), (of_another_kind, "is a Sharpened, not a linear layer"),
    (doubled, "does to its logits what is not known"), (capped_in_large_logits, "does to its logits what is not"),
    (lambda: Around(model_of("llama")), "Around is around the model"),
    (lambda: nn.DataParallel(model_of("llama")), "DataParallel is around the model"),
    (lambda: torch.compile(model_of("llama"), backend="eager"), "OptimizedModule is around the model"),
])  # fmt: skip
def test_what_cannot_be_asked_by_position_is_named_and_computed_whole(make, reason, caplog):
    model, batch = make(), batch_of()
    with caplog.at_level(logging.INFO):
        loss = learned(model, batch)
    assert loss.by_rows
    assert reason in loss.whole_because
    assert caplog.text.count(reason) == 1
    found = loss(model, batch, all_logits=False)
    assert found.outputs["logits"].shape[-1] == VOCABULARY
    torch.testing.assert_close(found.mean, model(**batch).loss, rtol=1e-4, atol=1e-4)


def test_an_output_layer_that_changes_is_seen():
    model, batch = model_of("llama"), batch_of()
    loss = learned(model, batch)
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False)
    want, _ = scored(loss, model, batch, 0.0, all_logits=True)
    found, _ = scored(loss, model, batch, 0.0, all_logits=False)
    assert "another output layer" in loss.whole_because
    torch.testing.assert_close(found.mean, want.mean)
    loss.learn(lambda few: model(**few), batch, model=model)
    assert loss.whole_because == ""
    assert_same(loss, model, batch)
    handle = model.lm_head.register_forward_hook(lambda module, args, out: 2 * out)
    want, _ = scored(loss, model, batch, 0.0, all_logits=True)
    found, _ = scored(loss, model, batch, 0.0, all_logits=False)
    torch.testing.assert_close(found.mean, want.mean, rtol=0, atol=0)
    handle.remove()
    assert_same(loss, model, batch)


def test_the_layer_is_itself_again_after_an_error():
    model, batch = model_of("llama"), batch_of()
    loss = learned(model, batch)
    with pytest.raises((TypeError, ValueError)):
        loss(model, batch | {"position_ids": "none"}, all_logits=False)
    assert "forward" not in vars(model.lm_head)
    with torch.no_grad():
        assert model(**batch).logits.shape[-1] == VOCABULARY


@pytest.mark.parametrize("trains", [True, False])
def test_autocast_of_the_model_is_that_of_its_output_layer(trains):
    model, batch = model_of("llama"), batch_of()
    model.lm_head.requires_grad_(trains)
    inside = model.forward

    def autocast(*args: Any, **kwargs: Any) -> Any:  # as Accelerate wraps a model
        with torch.autocast("cpu", torch.bfloat16):
            return inside(*args, **kwargs)

    model.forward = autocast
    loss = learned(model, batch)
    assert loss.whole_because == ""
    assert_same(loss, model, batch, rtol=0.05)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_so_in_loss_and_gradient(value):
    model, batch = model_of("llama"), batch_of()
    loss = learned(model, batch)
    with torch.no_grad():
        model.lm_head.weight[3] = value
    results = [scored(loss, model, batch, 0.0, all_logits=whole) for whole in (True, False)]
    (want, plain), (got, ours) = results
    assert torch.equal(want.losses.isfinite(), got.losses.isfinite())
    assert not got.mean.isfinite()
    for name, gradient in plain.items():
        assert gradient.isfinite().all() == ours[name].isfinite().all(), name


def test_all_processes_ask_by_position_or_none():
    models, found = [model_of("llama"), hooked()], ["", ""]

    def process(rank: int, agree: Callable[[int], int]) -> None:
        loss = ModelLoss(learned(models[rank], batch_of()).rules)
        loss.learn(lambda few: models[rank](**few), batch_of(), agree, models[rank])
        found[rank] = loss.whole_because

    two_processes(process)
    assert found[0] == "another process cannot do without"
    assert "hooks" in found[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_function_alone(dtype):
    """Twice the gradient for twice the loss, and again for a second backward; float16 is scaled in float32."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (13,), generator=generator)
    found = chunked_cross_entropy(hidden, labels, lambda h, at: F.linear(h, weight), VOCABULARY, [weight], 0.2)
    losses, right = row_losses(F.linear(hidden, weight), labels, 0.2)
    torch.testing.assert_close(found.losses, losses.detach())
    assert torch.equal(found.right, right)
    loose = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-5)
    for scale in (2.0, 4096.0):
        got = torch.autograd.grad(found.total * scale, [hidden, weight], retain_graph=True)
        want = torch.autograd.grad(losses.sum() * scale, [hidden, weight], retain_graph=True)
        for one, other in zip(got, want, strict=True):
            assert one.dtype == dtype
            torch.testing.assert_close(one, other, rtol=loose, atol=loose * float(other.abs().max()))


def test_without_gradients_none_are_made():
    calls = []

    def head(part: Tensor, at: slice) -> Tensor:
        calls.append((len(part), torch.is_grad_enabled()))
        return part @ torch.ones(8, VOCABULARY)

    hidden = torch.ones(12, 8, requires_grad=True)
    with torch.no_grad():
        found = chunked_cross_entropy(hidden, torch.zeros(12, dtype=torch.long), head, VOCABULARY)
    assert calls == [(5, False), (5, False), (2, False)]
    assert not found.total.requires_grad


@pytest.mark.parametrize("label", [VOCABULARY, -1])
def test_a_label_that_is_no_class_is_refused(label):
    hidden, weight = torch.ones(2, 8), torch.ones(VOCABULARY, 8)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_cross_entropy(hidden, torch.tensor([0, label]), lambda h, at: F.linear(h, weight), VOCABULARY)


def test_the_trainer_asks_by_position_and_gives_logits_to_who_wants_them(tmp_path):
    data = texts(6)
    trainer = trainer_on(tmp_path, data, max_steps=1, eval_dataset=data)
    batch = trainer.data_collator(list(data))
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    assert trainer._losses[True].whole_because == ""
    _, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    assert outputs["logits"].shape[-1] == 32
    metrics = trainer.evaluate()
    assert trainer._losses[False].whole_because == ""
    want = trainer.predict(data).metrics  # all logits
    for name in (f"loss_{task}" for task in trainer.tasks):
        assert metrics[f"eval_{name}"] == pytest.approx(want[f"test_{name}"], rel=1e-5)
