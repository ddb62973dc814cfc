"""The choice among words: what float64 gives for every row alone and every word written out."""

from __future__ import annotations

import math

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from alora_kernels import route
from alora_kernels.training import answer_loss, choice_accuracy
from alora_kernels.tuner import ALoRAConfig

TASKS = ["one", "two", "three", "four"]
EOS = 2
WORDS = {
    "one": [[5], [6], [7]],
    "two": [[5, 8], [5, 9], [5, 9, 9, 4], [6, 8, 8]],  # with an end only: one begins another
    "three": [[5, 8, 3], [5, 9], [11, 4, 4, 4], [11, 4, 5]],  # first tokens are shared
    "four": [[5, 5, 5], [5, 5], [5]],
}


@pytest.fixture(scope="module")
def model():
    """A tiny Llama with sharp predictions and an adapter that does something, in float64."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    )
    tuned = get_peft_model(base, ALoRAConfig(r=4, tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.25)
    return tuned.double().eval()


@torch.no_grad()
def score(model, task: str, prompt: list[int], word: list[int], per_token: bool) -> float:
    """Log-likelihood of a word after a prompt, the row alone."""
    with route(torch.tensor([TASKS.index(task)])):
        log_p = model(input_ids=torch.tensor([prompt + word])).logits[0].double().log_softmax(-1)
    total = sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(word))
    return total / len(word) if per_token else total


def rows_with(model, per_token: bool, place: int) -> tuple[list[dict], list[float]]:
    """Rows answered with the word in this place of the ranking by brute force, and the best word's lead."""
    generator, out, leads = torch.Generator().manual_seed(1), [], []
    for i in range(48):
        task = TASKS[i % 4]
        prompt = torch.randint(
            3, 16, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator
        ).tolist()
        end = [EOS] if task in ("two", "four") else []
        scores = [(score(model, task, prompt, word + end, per_token), word) for word in WORDS[task]]
        ranked = sorted(scores, reverse=True)
        answer = [*ranked[place][1], EOS]
        labels = [-100] * len(prompt) + answer
        out.append({"input_ids": prompt + answer, "labels": labels, "task": task})
        leads.append(ranked[0][0] - ranked[1][0])
    return out, leads


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_most_likely_word_wins(model, per_token, batch_size):
    options = dict(tasks=TASKS, eos_token_id=EOS, per_token=per_token, batch_size=batch_size)
    best, leads = rows_with(model, per_token, 0)
    assert min(leads) > 1e-6
    done = []
    assert choice_accuracy(model, best, WORDS, on_batch=done.append, **options) == dict.fromkeys(TASKS, 1.0)
    assert sum(done) == len(best)
    second, _ = rows_with(model, per_token, 1)
    assert choice_accuracy(model, second, WORDS, **options) == dict.fromkeys(TASKS, 0.0)
    for task in TASKS:  # the control: one task for all rows
        alone = [row for row in best if row["task"] == task]
        assert choice_accuracy(model, alone, WORDS, **options) == {task: 1.0}


def test_sums_and_means_differ(model):
    rows, _ = rows_with(model, True, 0)
    assert choice_accuracy(model, rows, WORDS, tasks=TASKS, eos_token_id=EOS)["two"] < 1.0


def test_words_of_one_token_are_chosen_by_their_logits_with_one_forward(model):
    rows, _ = rows_with(model, False, 0)
    rows = [row for row in rows if row["task"] == "one"]
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    assert choice_accuracy(model, rows, {"one": [5, 6, 7]}, tasks=TASKS) == {"one": 1.0}
    hook.remove()
    assert len(calls) == 1
    for row in rows:
        with torch.no_grad(), route(torch.tensor([0])):
            logits = model(input_ids=torch.tensor([row["input_ids"][: row["labels"].count(-100)]])).logits[0, -1]
        assert [5, 6, 7][int(logits[[5, 6, 7]].argmax())] == row["input_ids"][-2]


def test_words_out_of_the_race_cost_nothing(model):
    rows, _ = rows_with(model, False, 0)
    rows = [row for row in rows if row["task"] == "three"]
    many = [*WORDS["three"], *([12, a, b, a] for a in range(3, 16) for b in range(3, 16))]
    calls = []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    choice_accuracy(model, rows, {"three": many}, tasks=TASKS, eos_token_id=EOS)
    hook.remove()
    assert len(calls) < 60  # of 170 words


def test_other_answers_are_wrong_and_words_are_told_from_their_beginnings(model):
    rows = [{"input_ids": [3, 4, *a, EOS], "labels": [-100, -100, *a, EOS], "task": "one"} for a in ([5, 9], [9])]
    assert choice_accuracy(model, rows, {"one": [[5]]}, tasks=TASKS, eos_token_id=EOS) == {"one": 0.0}
    right = [{"input_ids": [3, 4, 5], "labels": [-100, -100, 5], "task": "one"}]
    for eos in (EOS, None):
        assert choice_accuracy(model, right, {"one": [[5]]}, tasks=TASKS, eos_token_id=eos) == {"one": 1.0}


def test_words_that_nothing_can_tell_apart(model):
    rows, _ = rows_with(model, False, 0)
    with pytest.raises(ValueError, match=r"tokens \[5\] is the beginning of \[5, 5\].*eos_token_id"):
        choice_accuracy(model, rows, {"four": WORDS["four"]}, tasks=TASKS)
    with pytest.raises(ValueError, match="no words"):
        choice_accuracy(model, rows, {"four": []}, tasks=TASKS)
    with pytest.raises(ValueError, match="no tokens"):
        choice_accuracy(model, rows, {"four": [[]]}, tasks=TASKS)
    one = [{"input_ids": [3, 5, EOS], "labels": [-100, 5, EOS], "task": "one"}]
    assert choice_accuracy(model, one, {"one": [[5], [5]]}, tasks=TASKS) == {"one": 1.0}  # the same tokens twice


def masked(row: dict) -> dict:
    return row | {"labels": [-100] * len(row["labels"])}


def test_rows_that_ask_nothing_are_left_out_and_counted(model):
    rows, _ = rows_with(model, False, 0)
    some = [masked(row) if i % 8 < 4 else row for i, row in enumerate(rows)]
    kept = [row for i, row in enumerate(rows) if i % 8 >= 4]
    options = dict(tasks=TASKS)
    with pytest.warns(UserWarning, match="24 of 48 rows are left out: no label in them follows a token"):
        found = choice_accuracy(model, some, WORDS, eos_token_id=EOS, **options)
    assert found == choice_accuracy(model, kept, WORDS, eos_token_id=EOS, **options)
    with pytest.warns(UserWarning, match="24 of 48 rows"):
        losses = answer_loss(model, some, **options)
    assert losses == pytest.approx(answer_loss(model, kept, **options), rel=1e-12)

    none = [masked(row) if row["task"] == "two" else row for row in rows]
    first = {"input_ids": [5, 3], "labels": [5, -100], "task": "two"}  # nothing before it predicts it
    with pytest.warns(UserWarning, match="13 of 49 rows"):
        found = choice_accuracy(model, [*none, first], WORDS, eos_token_id=EOS, **options)
    with pytest.warns(UserWarning, match="13 of 49 rows"):
        losses = answer_loss(model, [*none, first], **options)
    assert math.isnan(found["two"]) and math.isnan(losses["two"])
    assert list(found) == TASKS and not any(math.isnan(v[task]) for v in (found, losses) for task in TASKS[2:])


@pytest.mark.parametrize("kind", [torch.tensor, lambda values: torch.tensor(values).numpy(), tuple])
def test_ids_of_any_kind(model, kind):
    rows, _ = rows_with(model, False, 0)
    other = [row | {key: kind(row[key]) for key in ("input_ids", "labels")} for row in rows]
    options = dict(tasks=TASKS, eos_token_id=EOS)
    assert choice_accuracy(model, other, WORDS, **options) == choice_accuracy(model, rows, WORDS, **options)
