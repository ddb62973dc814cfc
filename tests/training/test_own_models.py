"""The loss is the model's own: what it adds to the cross entropy, heads and forwards that are usual only in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn

from alora_kernels import route
from alora_kernels.training import ALoRATrainer, TaskCollator
from alora_kernels.training.loss import ModelLoss
from alora_kernels.training.rules import BatchRules
from alora_kernels.tuner import ALoRAConfig
from tests.support import trainers
from tests.support.families import TASKS, build, rows
from tests.support.trainers import CONFIG, assert_close, logs_of, sgd, step, texts, trainer_on, two_processes


class Weighted(tf.BertForSequenceClassification):
    """One class weighs more, which a mean over labels of one class does not show."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 1.0, 5.0]))
        return outputs


def test_class_weights_are_seen_in_a_batch_of_one_class(tmp_path, monkeypatch):
    """All rows of the first batch have one class."""
    monkeypatch.setattr("transformers.BertForSequenceClassification", Weighted)
    model = build("Bert", "row")
    examples = [{**row, "labels": 0 if i < 8 else i % 3} for i, row in enumerate(rows(model, "row") * 4)]
    batches = [examples[:8], examples[8:]]
    want = []
    for batch in batches:
        inputs = TaskCollator(0, TASKS, model=model)(batch)
        with torch.no_grad(), route(inputs.pop("task_ids")):
            want.append(float(model(**inputs).loss))
    args = sgd(tmp_path, max_steps=2, learning_rate=0.0, train_sampling_strategy="sequential")
    trainer = ALoRATrainer(model=model, args=args, train_dataset=Dataset.from_list(examples))
    trainer.train()
    logs = logs_of(trainer)
    assert [entry["loss"] for entry in logs] == pytest.approx(want, rel=1e-4)
    assert "loss_a" not in logs[0]


class AnyArguments(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, **batch):
        return self.inside(**batch)


class NeedsLabels(AnyArguments):
    def forward(self, input_ids, attention_mask, labels):
        return self.inside(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class LastLogits(AnyArguments):
    """Without labels it is asked for the next token only."""

    def forward(self, input_ids, attention_mask=None, labels=None):
        outputs = self.inside(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return (
            {"logits": outputs.logits[:, -1:]} if labels is None else {"loss": outputs.loss, "logits": outputs.logits}
        )


@pytest.mark.parametrize("kind", [AnyArguments, NeedsLabels, LastLogits])
@pytest.mark.parametrize(("family", "head"), [("Roberta", "row"), ("Llama", "lm")])
def test_a_model_inside_a_module_of_ones_own(tmp_path, kind, family, head):
    if kind is LastLogits and head == "row":
        pytest.skip("its logits have no positions")
    model = build(family, head)
    examples = rows(model, head, seed=1) + rows(model, head, seed=2)
    want, reference = step(model, examples, tmp_path)
    got, log = step(kind(build(family, head)).eval(), examples, tmp_path, remove_unused_columns=False)
    assert log["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert log["loss_a"] == pytest.approx(reference["loss_a"], rel=1e-5)
    assert_close({name.removeprefix("inside."): value for name, value in got.items()}, want, rtol=1e-4, atol=1e-6)


def test_a_mean_of_rows_is_cut_by_rows(tmp_path):
    """CTC: labels of a row do not count one by one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    front = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2}
    config = tf.Wav2Vec2Config(
        vocab_size=20, **sizes, **front, feat_extract_norm="layer", num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, ctc_loss_reduction="mean", mask_time_prob=0.0, layerdrop=0.0,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    examples = [
        {"input_values": torch.randn(400, generator=generator).tolist(), "labels": list(range(1, 3 + i)), "task": task}
        for i, task in enumerate(TASKS * 4)
    ]

    def collate(features: list) -> dict[str, Tensor]:
        labels = [torch.tensor(f["labels"]) for f in features]
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        return {"input_values": torch.tensor([f["input_values"] for f in features]), "labels": padded}

    logged, moved = [], []
    for size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        adapted = ALoRAConfig(r=2, tasks=TASKS, target_modules=["q_proj", "v_proj"], init_weights=False)
        model = get_peft_model(tf.Wav2Vec2ForCTC(config), adapted)
        gradient, log = step(
            model, examples, tmp_path, collate, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate, train_sampling_strategy="sequential",
        )  # fmt: skip
        logged.append(log["loss"])
        moved.append(gradient)
    assert logged[1] == pytest.approx(logged[0], rel=1e-4)
    assert_close(moved[1], moved[0], atol=1e-4)


def test_processes_agree_on_a_loss_and_run_the_model_equally_often():
    """One of two has a first batch without labels: forwards of DDP and gathers of scores must not differ."""
    calls, found = [0, 0], [None, None]
    models = [build("Llama", "lm") for _ in range(2)]

    def process(rank: int, agree: Callable[[int], int]) -> None:
        def call(few: dict[str, Tensor]):
            calls[rank] += 1
            return models[rank](**few)

        ids = torch.arange(10, 22).view(2, 6)
        loss = ModelLoss(BatchRules.of(models[rank]))
        with route(torch.tensor([0, 1])):
            loss.learn(call, {"input_ids": ids, "labels": torch.full_like(ids, -100) if rank else ids}, agree)
        found[rank] = (loss.by_rows, loss.shifts)

    two_processes(process)
    assert found == [(True, True)] * 2
    assert calls[0] == calls[1] > 0


class PenalisedLlama(tf.LlamaForCausalLM):
    """A model that adds a term of its own to the loss."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        outputs = super().forward(input_ids, attention_mask, labels=labels, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * outputs.logits.float().logsumexp(-1).pow(2).mean()
        return outputs


ROUTER = dict(num_key_value_heads=2, output_router_logits=True, router_aux_loss_coef=0.5)
EXPERTS = ROUTER | dict(num_experts=4, num_experts_per_tok=2)
SWITCH = dict(
    vocab_size=32, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=2, num_experts=4, decoder_start_token_id=0,
    dropout_rate=0.0, router_jitter_noise=0.0, output_router_logits=True,
)  # fmt: skip
MODELS = {
    "mixtral": (tf.MixtralForCausalLM, CONFIG | ROUTER | dict(num_local_experts=4)),
    "qwen3-moe": (tf.Qwen3MoeForCausalLM, CONFIG | EXPERTS | dict(head_dim=16, moe_intermediate_size=16)),
    "olmoe": (tf.OlmoeForCausalLM, CONFIG | EXPERTS),
    "a term of its own": (PenalisedLlama, CONFIG),
    "switch": (tf.SwitchTransformersForConditionalGeneration, SWITCH),
}
PLAIN = 3.6  # about ln(32): what the cross entropy of a random model is


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_and_its_gradients_are_the_models_own(tmp_path, kind):
    torch.manual_seed(0)
    targets = ["q", "v"] if kind == "switch" else ["q_proj", "v_proj"]
    model_class, settings = MODELS[kind]
    config = ALoRAConfig(r=2, tasks=trainers.TASKS, target_modules=targets, init_weights=False)
    model = get_peft_model(model_class(model_class.config_class(**settings)), config)
    data = texts(6)
    trainer = trainer_on(tmp_path, data, model, max_steps=1, eval_dataset=data)
    batch = trainer.data_collator(list(data))
    model.train()
    got = gradients(model, trainer.compute_loss(model, dict(batch)))
    inputs = {k: v for k, v in batch.items() if k != "task_ids"}
    with route(batch["task_ids"]):
        want = gradients(model, model(**inputs).loss)
    torch.testing.assert_close(got[0], want[0])
    if kind != "switch":  # where its own terms are small
        assert want[0] > PLAIN + 0.4
    assert_close(got[1], want[1], rtol=1.3e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(want[0]), rel=1e-4)
    trainer.train()
    assert logs_of(trainer)[-1]["loss"] == pytest.approx(float(want[0]), rel=1e-4)


def gradients(model: nn.Module, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
