"""A row's logits and loss never depend on its neighbours: every family and head, against the row alone."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from alora_kernels import route
from alora_kernels.training import TaskCollator
from alora_kernels.training.loss import ModelLoss
from alora_kernels.training.rules import BatchRules
from tests.support.families import FAMILIES, SUFFIXES, TASKS, alone, build, head_class, rows

CASES = [(family, head) for family in FAMILIES for head in SUFFIXES if head_class(family, head) is not None]


@pytest.mark.parametrize(("family", "head"), CASES, ids=["-".join(case) for case in CASES])
def test_a_mixed_batch_is_its_rows_alone(family, head):
    model, examples = build(family, head), rows(build(family, head), head)
    batch = TaskCollator(None, TASKS, model=model)(examples)
    loss = ModelLoss(BatchRules.of(model))

    def routed(few):
        with route(few["task_ids"]):
            return model(**{k: v for k, v in few.items() if k != "task_ids"})

    loss.learn(routed, batch)
    ids = batch.pop("task_ids")
    with torch.no_grad(), route(ids):
        logits = model(**batch).logits
        scored = loss(model, batch, all_logits=False)
    left = BatchRules.of(model).pad_left
    total, labels = 0.0, 0
    for row, got, sum_of_row, count in zip(examples, logits, scored.losses, scored.counts, strict=True):
        with torch.no_grad(), route(torch.tensor([TASKS.index(row["task"])])):
            want = model(**alone(row))
        tokens = slice(None)
        if head != "row":
            length = len(row["labels"] if head == "seq2seq" else row["input_ids"])
            tokens = slice(-length, None) if left else slice(length)
        torch.testing.assert_close(got[tokens], want.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sum_of_row, want.loss * count, rtol=1e-4, atol=1e-4)
        total, labels = total + float(want.loss) * int(count), labels + int(count)
    assert float(scored.mean) == pytest.approx(total / labels, rel=1e-4)


@pytest.mark.parametrize(("family", "head", "left", "positions"), [
    ("Bert", "row", False, False),
    ("Roberta", "masked", False, False),
    ("Roberta", "lm", False, False),  # counts from padding_idx + 1
    ("Llama", "lm", True, True),
    ("Llama", "row", False, False),  # reads the last token that is no padding
    ("Bloom", "lm", False, False),  # cannot be told positions
    ("RecurrentGemma", "lm", False, False),  # padding on the left would enter its state
    ("T5", "seq2seq", False, False),
])  # fmt: skip
def test_where_padding_goes(family, head, left, positions):
    model = build(family, head)
    batch = TaskCollator(None, TASKS, model=model)(rows(model, head))
    assert batch["attention_mask"][1].tolist() == ([0] * 6 + [1] * 3 if left else [1] * 3 + [0] * 6)
    assert ("position_ids" in batch) == positions


def test_a_head_that_reads_the_last_token_is_padded_on_the_left():
    sizes = {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "num_labels": 3}
    torch.manual_seed(0)
    model = tf.XLNetForSequenceClassification(tf.XLNetConfig(**sizes)).eval()
    examples = [{"input_ids": [7, 8, 9, 10, 11], "task": "a"}, {"input_ids": [12, 13], "task": "a"}]
    batch = TaskCollator(5, TASKS, model=model)(examples)
    del batch["task_ids"]
    with torch.no_grad():
        for row, got in zip(examples, model(**batch).logits, strict=True):
            torch.testing.assert_close(got, model(**alone(row)).logits[0])


def test_padding_that_nothing_masks_is_refused():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    collate = TaskCollator(0, TASKS, model=tf.FNetForSequenceClassification(tf.FNetConfig(**sizes)))
    same = [{"input_ids": [7, 8], "task": "a"}, {"input_ids": [9, 8], "task": "b"}]
    assert set(collate(same)) == {"input_ids", "task_ids"}
    with pytest.raises(ValueError, match="takes no attention_mask.*a row of 1 tokens beside 2"):
        collate([{"input_ids": [7], "task": "a"}, *same])


def test_layers_that_let_padding_in_are_named():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = tf.ConvBertForTokenClassification(tf.ConvBertConfig(**sizes, intermediate_size=48, embedding_size=16))
    collate = TaskCollator(0, TASKS, model=model)
    collate([{"input_ids": [7, 8], "task": "a"}, {"input_ids": [9, 8], "task": "b"}])  # nothing to say
    with pytest.warns(UserWarning, match="layers of convbert let padding change the tokens beside it"):
        collate([{"input_ids": [7, 8], "task": "a"}, {"input_ids": [9], "task": "b"}])


def test_a_model_of_two_texts_is_an_encoder_decoder():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    part = tf.BertConfig(**sizes, intermediate_size=48)
    config = tf.EncoderDecoderConfig.from_encoder_decoder_configs(part, part, decoder_start_token_id=1, pad_token_id=0)
    rules = BatchRules.of(tf.EncoderDecoderModel(config))
    assert rules.encoder_decoder
    assert not rules.pad_left
    assert not rules.shifts
