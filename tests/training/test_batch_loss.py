"""One gradient however a step is cut into batches, and it is that of the model's own loss on the rows alone."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from alora_kernels import FusedALoRALinear, route
from alora_kernels.training import ALoRATrainer, answer_loss
from alora_kernels.training.loss import ModelLoss, kept_positions, predictable, row_losses
from alora_kernels.training.rules import BatchRules
from tests.support.families import TASKS, alone, build, rows
from tests.support.trainers import assert_step, rows_alone, sgd, step

MULTI_HOT = [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
WHOLE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
QUARTERS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def trainer_of(model: nn.Module, examples: list, folder) -> ALoRATrainer:
    return ALoRATrainer(model=model, args=sgd(folder), train_dataset=Dataset.from_list(examples))


@pytest.mark.parametrize(("family", "head"), [
    ("Llama", "lm"), ("GPT2", "lm"), ("OPT", "lm"), ("Bloom", "lm"), ("Bert", "row"), ("Bert", "token"),
    ("Roberta", "masked"), ("Llama", "row"), ("T5", "seq2seq"), ("Bart", "seq2seq"), ("Bart", "lm"),
])  # fmt: skip
@pytest.mark.parametrize("cut", [WHOLE, QUARTERS], ids=["1x8", "4x2"])
def test_the_gradient_is_that_of_the_rows_alone(tmp_path, family, head, cut):
    model = build(family, head)
    examples = rows(model, head, seed=1) + rows(model, head, seed=2)
    kind = "token" if (family, head) == ("Bart", "lm") else head  # this class compares without a shift
    want = rows_alone(model, examples, kind)
    assert_step(step(model, examples, tmp_path, **cut), want)


@pytest.mark.parametrize("cut", [WHOLE, QUARTERS], ids=["1x8", "4x2"])
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression", None])
def test_losses_that_are_no_cross_entropy_are_the_models_own(tmp_path, problem, cut):
    model = build("Bert", "row", problem_type=problem)
    examples = [{**row, "labels": MULTI_HOT[i % 4]} for i, row in enumerate(rows(model, "row") * 2)]
    want = rows_alone(model, examples, "row")
    got = step(model, examples, tmp_path, **cut)
    assert_step(got, want)
    assert "loss_a" not in got[1]  # no loss by rows is made up


@pytest.mark.parametrize(("family", "head"), [("Llama", "lm"), ("T5", "seq2seq")])
def test_label_smoothing_is_spread_over_a_step_too(tmp_path, family, head):
    examples = rows(build(family, head), head, seed=1) + rows(build(family, head), head, seed=2)
    one, whole = step(build(family, head), examples, tmp_path, label_smoothing_factor=0.2)
    many = step(build(family, head), examples, tmp_path, label_smoothing_factor=0.2, **QUARTERS)
    assert_step(many, (one, whole["loss"]))


class TwiceItsCrossEntropy(LlamaForCausalLM):
    """A class whose name promises the usual loss, and whose loss is another one."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        outputs.loss = None if outputs.loss is None else 2 * outputs.loss
        return outputs


def with_a_loss_of_its_own() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = TwiceItsCrossEntropy(LlamaConfig(**sizes, intermediate_size=48)).requires_grad_(False)
    layer = model.model.layers[0].mlp
    layer.down_proj = FusedALoRALinear.from_linear(layer.down_proj, 2, tasks=TASKS)
    return model


def test_a_loss_is_not_guessed_by_the_class(tmp_path):
    model = with_a_loss_of_its_own()
    examples = [{"input_ids": [4, 5, 6, 7], "labels": [4, 5, 6, 7], "task": "a"}]
    with torch.no_grad(), route(torch.tensor([0])):
        want = float(model(**alone(examples[0])).loss)
    _, log = step(model, examples, tmp_path)
    assert log["loss"] == pytest.approx(want, rel=1e-4)
    assert "loss_a" not in log


def test_smoothing_of_a_loss_of_its_own_is_spread_over_a_step_too(tmp_path, monkeypatch):
    monkeypatch.setattr(TwiceItsCrossEntropy, "accepts_loss_kwargs", False, raising=False)
    examples = [{"input_ids": [4 + i, 5, 6, 7], "labels": [4, 5, 6, 7], "task": TASKS[i % 2]} for i in range(8)]
    results = []
    for cut in (WHOLE, QUARTERS):
        model = with_a_loss_of_its_own()
        torch.nn.init.normal_(model.model.layers[0].mlp.down_proj.lora_B)
        results.append(step(model, examples, tmp_path, label_smoothing_factor=0.1, **cut))
    (one, whole), many = results
    assert_step(many, (one, whole["loss"]))


def test_trying_the_loss_draws_nothing(tmp_path):
    model = build("Llama", "lm")
    trainer = trainer_of(model, rows(model, "lm"), tmp_path)
    batch = trainer.data_collator(rows(model, "lm"))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    before = torch.get_rng_state()
    assert trainer._has_token_loss(batch, model)
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_leaves_out_the_label_that_the_shift_drops(tmp_path):
    model = build("GPT2", "lm")
    examples = rows(model, "lm")
    trainer = trainer_of(model, examples, tmp_path)
    metrics = trainer.evaluate(Dataset.from_list(examples))
    losses = answer_loss(model, examples, tasks=TASKS)
    for task in TASKS:
        own = []
        for row in examples:
            if row["task"] == task:
                with torch.no_grad(), route(torch.tensor([TASKS.index(task)])):
                    own.append(float(model(**alone(row)).loss))
        assert losses[task] == pytest.approx(sum(own) / len(own), rel=1e-4)
        assert metrics[f"eval_loss_{task}"] == pytest.approx(losses[task], rel=1e-4)


def test_a_step_without_labels_leaves_the_weights(tmp_path):
    for family, head in (("Llama", "lm"), ("Bert", "token")):
        model = build(family, head)
        examples = [{**row, "labels": [-100] * len(row["input_ids"])} for row in rows(model, head)]
        moved, log = step(model, examples, tmp_path, logging_nan_inf_filter=False)
        assert log["loss"] == 0.0
        assert all((gradient == 0).all() for gradient in moved.values())


def test_logits_and_labels_of_other_places_are_not_compared():
    logits = torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"\(2, 3, 5\) and labels of shape \(2, 4\) cannot be aligned"):
        row_losses(logits, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="cannot be aligned"):
        row_losses(logits[:1], torch.zeros(2, 3, dtype=torch.long))


def test_labels_that_follow_no_token_are_left_out():
    labels = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert predictable(labels, mask).tolist() == [[-100, -100, -100, 4], [-100, 2, 3, 4]]
    assert predictable(labels, None).tolist() == [[-100, 2, 3, 4]] * 2
    asked = torch.tensor([[-100, -100, 3, -100], [-100, -100, -100, -100]])
    assert kept_positions(asked).tolist() == [1, 2]  # from before the first label to the last


@pytest.mark.parametrize(("family", "head"), [("Llama", "lm"), ("Bert", "row"), ("T5", "seq2seq")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_loss_is_known_in_any_dtype(tmp_path, family, head, dtype):
    model = build(family, head).to(dtype)
    if head != "row":
        model.get_output_embeddings().weight.data *= 4  # else bfloat16 gives one loss with and without a shift
    trainer = trainer_of(model, rows(model, head), tmp_path)
    batch = trainer.data_collator(rows(model, head))
    assert trainer._has_token_loss(batch, model)
    with torch.no_grad(), route(batch["task_ids"]):
        own = model(**{k: v for k, v in batch.items() if k != "task_ids"}).loss
        torch.testing.assert_close(trainer.compute_loss(model, batch).to(own.dtype), own)


def test_a_batch_with_images_is_tried_whole():
    """How many images a row has is not known, so none of them can be left out."""
    loss, seen = ModelLoss(BatchRules.of(build("Llama", "lm"))), []
    batch = {"input_ids": torch.ones(4, 3, dtype=torch.long), "labels": torch.ones(4, 3, dtype=torch.long)}
    loss.learn(lambda few: seen.append(len(few["input_ids"])), batch)
    loss.by_rows = None
    loss.learn(lambda few: seen.append(len(few["input_ids"])), batch | {"pixel_values": torch.ones(4, 3, 8, 8)})
    assert seen == [2, 4]


def test_row_losses_are_as_exact_as_torchs_with_the_classes_last():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(2, 3, 30_000), torch.randint(0, 30_000, (2, 3))
    leaves = {dtype: logits.detach().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64)}
    row_losses(leaves[torch.float32], labels)[0].sum().backward()
    nn.functional.cross_entropy(leaves[torch.float64].flatten(0, 1), labels.flatten(), reduction="sum").backward()
    wanted = leaves[torch.float64].grad
    assert (leaves[torch.float32].grad.double() - wanted).abs().max() <= 1e-6 * wanted.abs().max()
