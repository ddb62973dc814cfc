"""Answers that a model writes: in a mixed batch what each row alone gives; and their measures beside known figures."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM

from alora_kernels import route
from alora_kernels.training.answers import exact_match, last_number, number_match, rouge, written_answers
from tests.support import tiny

TASKS = ["math", "code"]
END = 7


@torch.no_grad()
def alone(model, prompt: list[int], task: str | None, limit: int) -> tuple[list[int], bool]:
    """Greedy decoding without a cache, a batch of one row without padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        if task is None:
            logits = model(input_ids=torch.tensor([ids])).logits
        else:
            with route(torch.tensor([TASKS.index(task)])):
                logits = model(input_ids=torch.tensor([ids])).logits
        if (token := int(logits[0, -1].argmax())) == END:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


def prompts() -> list[dict]:
    lengths = [3, 9, 1, 5, 5, 2, 7, 4]
    return [
        {"input_ids": tiny.tokens(1, n, seed=at)[0].tolist(), "task": TASKS[at % 2]} for at, n in enumerate(lengths)
    ]


def sharp(model):
    """Weights so large that answers differ, and some end."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_mixed_batch_writes_what_each_row_alone_writes(batch_size):
    model = sharp(tiny.adapted())
    base = model.get_base_model()
    own = GenerationConfig(repetition_penalty=1.8, no_repeat_ngram_size=2, max_new_tokens=1, eos_token_id=3)
    model.generation_config = base.generation_config = own
    expected = [alone(model, row["input_ids"], row["task"], 12) for row in prompts()]
    assert {ended for _, ended in expected} == {True, False} and len({tuple(ids) for ids, _ in expected}) > 5
    done = []
    how = {"ends": [END], "max_tokens": 12, "batch_size": batch_size, "on_batch": done.append}
    assert written_answers(model, prompts(), tasks=TASKS, **how) == expected
    assert sum(done) == len(expected)
    assert model.generation_config is own and base.generation_config is own
    other = [{**row, "task": TASKS[1 - TASKS.index(row["task"])]} for row in prompts()]
    assert written_answers(model, other, tasks=TASKS, **how) != expected
    with model.disable_adapter():
        assert written_answers(model, prompts(), tasks=None, **how) == [
            alone(model, row["input_ids"], None, 12) for row in prompts()
        ]


def test_rows_that_padding_would_change_are_written_beside_their_equals():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    model = sharp(MambaForCausalLM(MambaConfig(vocab_size=tiny.VOCAB, **sizes)))
    found = written_answers(model, prompts(), tasks=None, ends=[END], max_tokens=6)
    assert found == [alone(model, row["input_ids"], None, 6) for row in prompts()]


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The  Eiffel Tower.", "eiffel tower", True),
        ("A", "A", True),
        ("the", "A", False),  # an answer of an article alone is its own
        ("", "a", False),
        ("1.5", "15", False),
        ("-5", "5", False),
        ("1,500", "1500", True),
        ("1,5", "15", False),
        ("It's 5.", "its 5", True),
        ("x < 3", "x > 3", False),
        ("?", "!", False),
        ("Straße", "STRASSE", True),
        ("e\u0301te", "\u00e9te", True),
        ("north", "north pole", False),
    ],
)
def test_exact_match(answer, reference, same):
    assert exact_match(answer, reference) == same


@pytest.mark.parametrize(
    ("answer", "reference", "figures"),  # of rouge-score 0.1.2: rougeL, rouge1, rouge2
    [
        ("The cat sat on the mat.", "the mat sat on the cat", (0.666666666667, 1.0, 0.8)),
        ("a b c d", "a c b d e", (0.666666666667, 0.888888888889, 0.0)),
        ("It's well-known (U.S.)", "its well known in the u s", (0.615384615385, 0.615384615385, 0.363636363636)),
        ("the the the the", "the cat", (0.333333333333, 0.333333333333, 0.0)),
        ("", "something", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge(answer, reference, figures):
    assert tuple(rouge(answer, reference).values()) == pytest.approx(figures, abs=1e-9)


def test_rouge_reads_words_of_other_alphabets():
    assert rouge("Привет, мир", "привет мир")["rouge"] == 1.0
    assert 0 < rouge("東京は雨", "東京は晴れ")["rouge"] < 1  # without spaces a character is a word


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("$1,234.50", "1234.5"),
        ("from 3 to -2", "-2"),
        ("5-3", "3"),
        ("\u22124 degrees", "-4"),
        ("1,2 and 3,45", "45"),
        ("about 1e3", "1000"),
        ("none", None),
        ("1e99999", "99"),  # no exponent that nobody could hold
    ],
)
def test_the_last_number(text, number):
    found = last_number(text)
    assert found == (None if number is None else Decimal(number))
    assert number_match("so 18.0", "#### 18") == 1.0 and number_match("so eighteen", "18") == 0.0
