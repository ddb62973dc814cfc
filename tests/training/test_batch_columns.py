"""What `TaskCollator` does with columns and labels: kept, padded, stacked, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers as tf

from alora_kernels.training import TaskCollator
from tests.support.families import T5, WIDTH, build

ROWS = [{"input_ids": [5, 6, 7], "task": "a"}, {"input_ids": [8], "task": "b"}]


def with_column(name, first, second):
    return [{**ROWS[0], name: first}, {**ROWS[1], name: second}]


def classifier(**changes):
    return tf.BertForSequenceClassification(tf.BertConfig(vocab_size=64, **WIDTH, **{"num_labels": 3, **changes}))


def collator(model):
    return TaskCollator(0, ["a", "b"], model=model)


def test_columns_that_the_forward_knows_are_kept_and_others_left_out():
    examples = with_column("token_type_ids", [0, 1, 1], [1])
    for row, text in zip(examples, ("one two three", "four"), strict=True):
        row["text"] = text
    batch = collator(classifier())(examples)
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [1, 0, 0]]
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "task_ids"}
    unknown = TaskCollator(0, ["a", "b"])(examples)  # no model: every column of numbers
    assert unknown["token_type_ids"].tolist() == [[0, 1, 1], [0, 0, 1]]
    assert "text" not in unknown


def test_a_pair_in_a_batch_is_the_pair_alone():
    torch.manual_seed(0)
    model = classifier().eval()
    examples = with_column("token_type_ids", [0, 1, 1], [1])
    batch = collator(model)(examples)
    del batch["task_ids"]
    with torch.no_grad():
        got = model(**batch).logits
        for row, logits in zip(examples, got, strict=True):
            pair = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}
            torch.testing.assert_close(logits, model(**pair).logits[0])
            assert not torch.allclose(logits, model(input_ids=pair["input_ids"]).logits[0], atol=1e-4)


def test_boxes_per_token_and_values_per_row():
    layout = tf.LayoutLMForTokenClassification(tf.LayoutLMConfig(vocab_size=64, **WIDTH))
    boxes = collator(layout)(with_column("bbox", np.arange(12).reshape(3, 4), [[1, 2, 3, 4]]))["bbox"]
    assert boxes.tolist()[1] == [[1, 2, 3, 4], [0] * 4, [0] * 4]
    spans = tf.BertForQuestionAnswering(tf.BertConfig(vocab_size=64, **WIDTH))
    assert collator(spans)(with_column("start_positions", 2, np.int64(0)))["start_positions"].tolist() == [2, 0]
    embeds = collator(spans)(with_column("inputs_embeds", np.ones((3, 2)), np.ones((1, 2))))["inputs_embeds"]
    assert embeds.shape == (2, 3, 2)
    assert embeds.dtype == torch.float32  # NumPy's float64 is nothing a model was made for


def test_decoder_inputs_have_their_own_length():
    model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, **T5))
    examples = with_column("decoder_input_ids", [0], [0, 4, 5, 6])
    for row, labels in zip(examples, ([9], torch.tensor([9, 8, 7, 6])), strict=True):
        row["labels"] = labels
    batch = TaskCollator(0, ["a", "b"], model=model, pad_to_multiple_of=2)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[0, 0, 0, 0], [0, 4, 5, 6]]
    assert batch["labels"].tolist() == [[9, -100, -100, -100], [9, 8, 7, 6]]


@pytest.mark.parametrize(("values", "message"), [
    (([1, 2], [1, 2, 3]), r"'token_type_ids' cannot be batched: its rows have shapes \(2,\) and \(3,\)"),
    ((["x", "y", "z"], ["x"]), r"'token_type_ids' cannot be batched: row 0 holds \['x', 'y', 'z'\], not numbers"),
    ((None, [1]), "'token_type_ids' has no value in row 0"),
    (([[1], [2, 3], [4]], [[1]]), "'token_type_ids' cannot be batched: row 0"),
])  # fmt: skip
def test_what_cannot_be_batched_is_named(values, message):
    with pytest.raises(ValueError, match=message):
        collator(classifier())(with_column("token_type_ids", *values))


def test_rows_without_tokens_or_with_several_sequences_are_named():
    for ids in ([], [[1, 2], [3, 4]]):
        with pytest.raises(ValueError, match="input_ids of row 1 of the batch have shape"):
            TaskCollator(0, ["a", "b"])([ROWS[0], {"input_ids": ids, "task": "b"}])
    with pytest.raises(ValueError, match="attention_mask must have one entry per token"):
        TaskCollator(0, ["a", "b"])(with_column("attention_mask", [1, 1, 1], [1, 1]))


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
@pytest.mark.parametrize("number", [int, np.int64, np.uint8, np.array, torch.tensor, lambda v: [v]])
def test_classes_may_be_any_integers_under_any_of_the_names(name, number):
    labels = collator(classifier())(with_column(name, number(2), number(1)))["labels"]
    assert labels.tolist() == [2, 1]
    assert labels.dtype == torch.long


def test_truth_values_are_classes():
    assert collator(classifier())(with_column("label", True, np.bool_(False)))["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("values", [(0.5, 2.0), (np.float64(0.5), 2), (torch.tensor(0.5), np.float32(2))])
def test_a_regression_gets_floats(values):
    labels = collator(classifier(num_labels=1))(with_column("label", *values))["labels"]
    assert labels.tolist() == [0.5, 2.0]
    whole = collator(classifier(num_labels=1))(with_column("label", 3, 2))["labels"]
    assert labels.dtype == whole.dtype == torch.float32  # mean squared error has no gradient for integers


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda v: [bool(x) for x in v]])
def test_several_labels_per_row_are_floats_even_where_they_are_as_many_as_tokens(kind):
    examples = with_column("labels", kind([1, 0, 1]), kind([0, 0, 1]))  # the first row has three tokens, too
    labels = collator(classifier())(examples)["labels"]
    assert labels.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert labels.dtype == torch.float32


@pytest.mark.parametrize(("model", "values", "message"), [
    ("row", ([1, 0], [0, 1]), "2 entries per row, the model has num_labels=3"),
    ("row", (1.0, 2.0), "labels are floats, but the model chooses one of num_labels=3"),
    ("row", (1, [1, 0, 1]), "'labels' mixes single labels and lists"),
    ("row", ("yes", "no"), "'labels' cannot be batched: row 0 holds 'yes', not numbers"),
    ("token", ([1, 2, 0], [1, 2]), "row 1 of the batch has 2 labels for 1 tokens"),
    ("token", ([0.5, 0.5, 0.1], [0.5]), "'labels' holds floats per token"),
])  # fmt: skip
def test_labels_that_do_not_fit_are_named(model, values, message):
    with pytest.raises(ValueError, match=message):
        collator(build("Bert", model))(with_column("labels", *values))


def test_labels_of_a_tagger_are_padded_beside_its_tokens():
    batch = collator(build("Bert", "token"))(with_column("labels", [1, 2, 0], np.array([1])))
    assert batch["labels"].tolist() == [[1, 2, 0], [1, -100, -100]]


def test_a_language_model_is_asked_for_nothing_that_follows_padding():
    examples = with_column("labels", [5, 6, 7], [8])
    assert collator(build("Llama", "lm"))(examples)["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]
    assert collator(build("Llama", "token"))(with_column("labels", [0, 1, 2], [1]))["labels"].tolist()[1][0] == 1
