"""Every model of the table does what its line says: right, without some modules, or refused."""

from __future__ import annotations

import re

import pytest

from .cases import CASES, Case
from .checks import checks_of, excluded, measured, merging
from .judge import LENGTHS, adapted, base_values, batch_of, make_rows, said
from .table import PAGE, TOLERANCE, line

ADAPTED = [case for case in CASES if not case.refused]


def _by_name(cases: list[Case]) -> list[object]:
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]


@pytest.mark.parametrize("case", _by_name(ADAPTED))
def test_a_model_is_right(case: Case) -> None:
    errors = {check: measured(case, check) for check in checks_of(case)}
    assert {check: error for check, error in errors.items() if error > TOLERANCE} == {}


@pytest.mark.parametrize("case", _by_name([case for case in CASES if case.merge_refused]))
def test_a_merge_that_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=case.merge_refused):
        merging(case)


@pytest.mark.parametrize("case", _by_name(ADAPTED))
def test_the_judge_would_see_a_wrong_task(case: Case) -> None:
    """The rows of the batch under another order of tasks are far away, so a mix-up cannot pass for rounding."""
    model = adapted(case)[0]
    batch = batch_of(case, make_rows(case, LENGTHS))
    right, other = (said(model, batch, ids) for ids in (batch["task_ids"], batch["task_ids"].roll(1)))
    for one, two in zip(right, other, strict=True):
        assert (one - two).abs().max() > 0.01 * one.abs().max()


@pytest.mark.parametrize("case", _by_name(ADAPTED))
def test_the_base_model_alone_is_right_on_a_padded_batch(case: Case) -> None:
    """Else the comparison would judge transformers, not us."""
    assert base_values(case) < TOLERANCE


@pytest.mark.parametrize("case", _by_name(ADAPTED))
def test_what_is_left_out_is_said(case: Case) -> None:
    """By name; where the warning lists too many, some of them."""
    texts = [text for text in adapted(case)[1] if text.startswith(("ALoRA leaves", "ALoRA adapts layers"))]
    said = set(re.findall(r"\w[\w.*]+", re.sub(r"\d+", "*", " ".join(texts))))
    left_out = {re.sub(r"\d+", "*", name) for name in excluded(case)}
    assert left_out <= said or (left_out & said and ", ..." in " ".join(texts)), (left_out - said, texts)


@pytest.mark.parametrize("case", _by_name([case for case in CASES if case.refused]))
def test_refused(case: Case) -> None:
    with pytest.raises((TypeError, ValueError), match=case.refused):
        adapted(case)


@pytest.mark.parametrize("case", _by_name(list(CASES)))
def test_the_page_says_what_the_checks_give(case: Case) -> None:
    assert line(case) in PAGE.read_text(encoding="utf-8").splitlines(), "run python -m tests.models --write-docs"
