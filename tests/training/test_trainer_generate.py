"""`ALoRATrainer` beside transformers' Seq2SeqTrainer: predictions are generated, each row with its task."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from alora_kernels.training import ALoRATrainer
from tests.support.families import build, rows
from tests.support.trainers import rows_alone, tokenizer


class Generating(ALoRATrainer, Seq2SeqTrainer):
    pass


def test_predictions_are_generated_as_for_the_rows_alone(tmp_path):
    model = build("T5", "seq2seq")
    examples = rows(model, "seq2seq")
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), predict_with_generate=True, generation_max_length=8, report_to="none", use_cpu=True
    )
    trainer = Generating(model=model, args=args, processing_class=tokenizer())
    found = trainer.predict(Dataset.from_list(examples))
    for row, predicted in zip(examples, found.predictions.tolist(), strict=True):
        alone = model.generate(
            input_ids=torch.tensor([row["input_ids"]]), max_length=8, adapter_names=[row["task"]]
        )[0].tolist()  # fmt: skip
        assert predicted[: len(alone)] == alone
    loss = rows_alone(model, examples, "seq2seq")[1]
    torch.testing.assert_close(found.metrics["test_loss"], loss, rtol=1e-4, atol=1e-5)
