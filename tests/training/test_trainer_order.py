"""The order of rows inside a step: sorted by task where everything in the batch is known to be per row, else kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from alora_kernels.training.tasks import side_by_side
from tests.support.trainers import assert_close, peft_model, rows, trainer_on

IDS = torch.tensor([2, 0, 1, 0])
TEXT = {"input_ids": torch.arange(12).view(4, 3), "attention_mask": torch.ones(4, 3), "labels": torch.arange(4)}
KEPT: dict[str, dict[str, Any]] = {
    "as many images as rows": {"pixel_values": torch.randn(4, 3, 2, 2)},
    "patches": {"pixel_values": torch.randn(4, 24), "image_grid_thw": torch.ones(4, 3, dtype=torch.long)},
    "one position for all rows": {"position_ids": torch.arange(3)[None]},
    "positions in three dimensions": {"position_ids": torch.zeros(3, 4, 3, dtype=torch.long)},
    "as many sections as rows": {"position_ids": torch.zeros(4, 3, 3, dtype=torch.long)},
    "packed": {"cu_seq_lens_q": torch.arange(4), "max_length_q": 3},
    "texts": {"prompts": ["a", "b", "c", "d"]},
    "a mask of a square": {"attention_mask": torch.ones(4, 1, 3, 3)},
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_batch_with_anything_else_keeps_its_order(kind):
    batch = {**TEXT, "task_ids": IDS, **KEPT[kind]}
    assert side_by_side(batch) is batch


def test_rows_of_a_task_come_together():
    batch = {**TEXT, "task_ids": IDS, "token_type_ids": torch.arange(12).view(4, 3) + 100}
    after = side_by_side(batch)
    assert after["task_ids"].tolist() == [0, 0, 1, 2]
    assert after["input_ids"][:, 0].tolist() == [3, 9, 6, 0]
    assert after["labels"].tolist() == [1, 3, 2, 0]
    assert after["token_type_ids"][:, 0].tolist() == [103, 109, 106, 100]
    per_token = {**TEXT, "task_ids": IDS.repeat_interleave(3).view(4, 3)}
    assert side_by_side(per_token) is per_token


def classifier() -> Any:
    from peft import get_peft_model

    from alora_kernels.tuner import ALoRAConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = BertForSequenceClassification(
        BertConfig(vocab_size=32, num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    )
    tasks = ["copy", "next", "zero"]
    return get_peft_model(base, ALoRAConfig(r=2, tasks=tasks, target_modules=["query", "value"], init_weights=False))


@pytest.mark.parametrize("kind", ["decoder", "classifier with segments"])
def test_values_and_gradients_do_not_depend_on_the_order(tmp_path, kind, monkeypatch):
    data = rows(7)
    if kind == "decoder":
        model = peft_model()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    else:
        model = classifier()
        data = data.remove_columns("labels").add_column("labels", [i % 5 for i in range(7)])
        data = data.add_column("token_type_ids", [[i % 2 for i in range(len(ids))] for ids in data["input_ids"]])
    trainer = trainer_on(tmp_path, data, model)
    batch = trainer.data_collator(list(data))
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    sort = side_by_side
    moved = []
    for function in (lambda b: moved.append(not torch.equal(sort(b)["task_ids"], b["task_ids"])) or sort(b), dict):
        monkeypatch.setattr("alora_kernels.training.trainer.side_by_side", function)
        model.train()
        model.zero_grad()
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert moved == [True]
    torch.testing.assert_close(found[0][0], found[1][0])
    assert any(g.abs().max() > 0 for n, g in found[0][1].items() if "lora_A" in n)
    assert_close(found[0][1], found[1][1], rtol=1.3e-6)
