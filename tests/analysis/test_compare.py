"""From folders to rows: closed forms through the whole chain, and reasons for everything that is not compared."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from alora_kernels.analysis import (
    chance,
    column_change,
    cosine,
    merged_change,
    pairwise,
    subspace_overlap,
    update_spectrum,
)
from alora_kernels.analysis.comparison import compare_units
from alora_kernels.analysis.similarity import cosines, overlaps
from alora_kernels.analysis.sources import units
from alora_kernels.analysis.table import where

from ..support.adapters import alora, lora
from ..support.refusals import refused
from .adapters import UP, Q, compared, het, orthogonal, randn, turned, unequal, vera

M = UP.format(0)


def one(rows, part, measure, **fields):
    """The value of the one row with these fields."""
    (row,) = [r for r in where(rows, part, measure) if all(getattr(r, k) == v for k, v in fields.items())]
    return row.value


def loras(tmp_path, matrices, **more):
    """One LoRA folder per A, all with the same random B."""
    b = {M: randn(9, 2, seed=3)}
    return compared(*(lora(tmp_path / f"l{i}", {M: a}, b, **more) for i, a in enumerate(matrices)))


def test_the_same_a_is_one_and_an_orthogonal_a_is_zero(tmp_path):
    p, q, _ = orthogonal()
    study = compared(alora(tmp_path / "a", ["x", "y", "z"], {M: torch.stack([p, p, q])}, {M: randn(5, 2)}))
    for measure in ("cosine", "overlap"):
        assert one(study.similarity, "A", measure, unit2="y") == pytest.approx(1.0, abs=1e-6)
        assert one(study.similarity, "A", measure, unit1="x", unit2="z") == pytest.approx(0.0, abs=1e-6)


def test_turned_spaces_overlap_by_the_squared_cosine_in_any_basis(tmp_path):
    p, q = turned([0.7, 0.7])
    basis = torch.linalg.qr(randn(2, 2).double()).Q
    study = loras(tmp_path, [p, basis @ (3 * q)])
    row = where(study.similarity, "A", "overlap")[0]
    assert row.value == pytest.approx(math.cos(0.7) ** 2, abs=1e-12)
    assert row.chance == pytest.approx(2 / 12)
    assert (row.layer, row.kind, row.module) == (0, "up_proj", M)
    assert one(study.similarity, "B", "cosine") == pytest.approx(1.0)
    assert where(study.similarity, "A", "cosine")[0].chance is None


def test_b_is_compared_by_its_columns(tmp_path):
    p, q = (t.float() for t in turned([0.4, 0.4]))
    folders = [lora(tmp_path / name, {M: randn(2, 5)}, {M: t.T.contiguous()}) for name, t in (("x", p), ("y", q))]
    study = compared(*folders)
    row = where(study.similarity, "B", "overlap")[0]
    assert row.value == pytest.approx(math.cos(0.4) ** 2, abs=1e-6) and row.chance == pytest.approx(2 / 12)


def test_all_pairs_at_once_equal_the_functions_of_one_pair():
    matrices = [randn(2, 6), randn(3, 6, seed=1), torch.zeros(2, 6), randn(2, 6, seed=2), randn(2, 5, seed=3)]
    table, level = overlaps(matrices)
    assert torch.allclose(table, pairwise(matrices, subspace_overlap), atol=1e-14, equal_nan=True)
    assert torch.allclose(cosines(matrices), pairwise(matrices, cosine), atol=1e-14, equal_nan=True)
    assert level[0, 1] == chance(2, 3, 6) and level[0, 4].isnan() and level[0, 2].isnan()


def test_changes_and_sizes_are_those_of_the_functions(tmp_path):
    a, b = randn(2, 8), randn(6, 2, seed=1)
    (unit,) = units(lora(tmp_path / "l", {M: a}, {M: b}, s=1.5))
    w = randn(6, 8, seed=2)
    study = compare_units([unit], base={M: w})
    assert study.similarity == [] and "There is one unit" in study.notes[0]
    moved, merged = column_change(torch.zeros_like(b), b), merged_change(w, a, b, 1.5)
    assert one(study.changes, "B", "magnitude", unit2="zero") == pytest.approx(moved.magnitude)
    assert math.isnan(one(study.changes, "B", "direction"))
    assert one(study.changes, "B", "columns_without_direction") == 2
    assert not where(study.changes, "A", "magnitude")
    assert one(study.changes, "W", "direction", unit2="W0") == pytest.approx(merged.direction)
    assert one(study.changes, "W", "relative_magnitude") == pytest.approx(merged.relative_magnitude)
    spectrum = update_spectrum(a, b, 1.5)
    assert one(study.norms, "sBA", "frobenius") == pytest.approx(spectrum.frobenius)
    assert one(study.norms, "sBA", "effective_rank") == pytest.approx(spectrum.effective_rank)
    assert one(study.norms, "A", "frobenius") == pytest.approx(float(a.norm()))


def test_a_start_is_found_by_name_or_is_the_only_one(tmp_path):
    before = {"x": randn(2, 12, seed=1), "y": randn(2, 12, seed=2)}
    after = {"x": 2 * before["x"], "y": -before["y"]}
    zero = {M: torch.zeros(5, 2)}
    stack = {name: torch.stack([t["x"], t["y"]]) for name, t in (("before", before), ("after", after))}
    alora(tmp_path / "start", ["x", "y"], {M: stack["before"]}, zero)
    end = alora(tmp_path / "end", ["x", "y"], {M: stack["after"]}, {M: randn(5, 2)})
    study = compared(end, init=tmp_path / "start")
    assert one(study.changes, "A", "relative_magnitude", unit1="x") == pytest.approx(1.0, abs=1e-6)
    assert one(study.changes, "A", "direction", unit1="x") == pytest.approx(0.0, abs=1e-6)
    assert one(study.changes, "A", "direction", unit1="y") == pytest.approx(2.0, abs=1e-6)
    assert one(study.changes, "A", "overlap", unit1="y") == pytest.approx(1.0, abs=1e-6)
    assert math.isnan(one(study.changes, "B", "direction", unit1="x"))
    only = units(lora(tmp_path / "seed", {M: before["x"]}, zero))
    found = compared(lora(tmp_path / "one", {M: after["x"]}, {M: randn(5, 2)}), init=only)
    assert one(found.changes, "A", "relative_magnitude", unit2="start") == pytest.approx(1.0, abs=1e-6)


def test_a_start_that_fits_nothing_is_refused_and_one_that_fits_in_part_is_said(tmp_path):
    trained = units(alora(tmp_path / "end", ["x", "y"], {M: randn(2, 2, 12)}, {M: randn(5, 2)}))
    other = alora(tmp_path / "s", ["p", "q"], {M: randn(2, 2, 12)}, {M: randn(5, 2)})
    refused("start of none of the units: it has p, q", compare_units, trained, other)
    half = units(alora(tmp_path / "h", ["x", "q"], {M: randn(2, 3, 12)}, {M: randn(5, 3)}))
    study = compare_units(trained, half)
    reasons = {(s.unit1, s.part): s.reason for s in study.skipped if s.unit2 == "start"}
    assert reasons["x", "A"] == "the start does not fit: shape [3, 12], not [2, 12]"
    assert reasons["y", "B"] == "the start does not fit: it is not there"


def test_unequal_ranks_have_overlaps_but_no_cosine_and_other_modules_are_named(tmp_path):
    more = UP.format(1)
    one_ = lora(tmp_path / "one", {M: randn(2, 12), more: randn(2, 12)}, {M: randn(9, 2), more: randn(9, 2)})
    study = compared(one_, lora(tmp_path / "two", {M: randn(4, 12, seed=1)}, {M: randn(9, 4, seed=1)}))
    assert {row.measure for row in study.similarity} == {"overlap"}
    assert where(study.similarity, "A", "overlap")[0].chance == pytest.approx(4 / 12)
    reasons = {(s.part, s.measure): (s.reason, s.modules) for s in study.skipped}
    assert reasons["A", "cosine"] == ("needs one shape: [2, 12] and [4, 12]", (M,))
    assert reasons["all", "all"] == ("two has no adapter there", (more,))


def test_one_shared_b_is_not_compared_with_itself(tmp_path):
    study = compared(alora(tmp_path / "a", ["x", "y"], {M: randn(2, 2, 12)}, {M: randn(5, 2)}))
    assert not [row for row in study.similarity if row.part == "B"]
    assert [(s.part, s.reason) for s in study.skipped] == [("B", "one matrix: the units of this folder share it")]
    assert any("share one B" in note for note in study.notes)


def test_zero_matrices_have_no_direction_and_other_widths_no_common_space(tmp_path):
    b = {M: torch.zeros(5, 2)}
    folders = [lora(tmp_path / "x", {M: randn(2, 12)}, b), lora(tmp_path / "y", {M: randn(2, 10)}, b)]
    study = compared(*folders)
    assert study.similarity == []
    reasons = {(s.part, s.measure): s.reason for s in study.skipped}
    assert reasons["B", "all"] == "all zeros: it has no direction"
    assert reasons["A", "overlap"] == "needs one number of inputs: [2, 12] and [2, 10]"
    assert math.isnan(one(study.norms, "sBA", "effective_rank", unit1="x"))


def test_vera_has_cosines_only_and_nothing_in_common_with_lora(tmp_path):
    d = torch.tensor([1.0, 1.0])
    vx = vera(tmp_path / "vx", {M: d}, {M: torch.tensor([1.0, 0.0, 0.0])})
    vy = vera(tmp_path / "vy", {M: -d}, {M: torch.tensor([1.0, 1.0, 0.0])})
    other = lora(tmp_path / "l", {M: randn(2, 12)}, {M: randn(3, 2)})
    study = compared(vx, vy, other)
    assert one(study.similarity, "lambda_d", "cosine") == pytest.approx(-1.0)
    assert one(study.similarity, "lambda_b", "cosine") == pytest.approx(math.sqrt(0.5))
    assert {row.measure for row in study.similarity} == {"cosine"}
    reasons = {s.reason for s in study.skipped}
    assert "a vector has no subspace" in reasons
    assert "no part in common: lambda_b, lambda_d and A, B" in reasons
    assert one(study.changes, "lambda_b", "magnitude", unit1="vy") == pytest.approx(math.sqrt(2))
    assert any("different kinds" in note for note in study.notes)


def test_clients_of_unequal_rank_are_compared_by_every_part_they_have(tmp_path):
    run = tmp_path / "run" / "clients" / "abc"
    for name, r, seed in (("one", 2, 0), ("two", 4, 20)):
        parts = het(M, r, seed=seed)
        parts[f"{M}.B2"].zero_()
        unequal(run / name, parts)
    study = compared(tmp_path / "run", base={M: randn(7, 5)})
    measured = {(row.part, row.measure) for row in study.similarity}
    assert measured == {("A", "overlap"), ("M", "overlap"), ("B1", "overlap"), ("B", "cosine"), ("B", "overlap")}
    assert one(study.similarity, "B", "overlap") == pytest.approx(1.0)
    assert one(study.similarity, "M", "overlap") == pytest.approx(1.0)  # four columns fill a space of three
    reasons = {(s.part, s.measure): s.reason for s in study.skipped}
    assert reasons["sBA", "frobenius"] == reasons["W", "change"] == "the folder does not say s"
    assert reasons["B2", "all"] == "all zeros: it has no direction"
    assert 1 <= one(study.norms, "sBA", "effective_rank", unit1="two") <= 3
    assert any("Clients of unequal rank" in note for note in study.notes)


def test_an_unfinished_client_is_said(tmp_path):
    run = tmp_path / "run" / "clients" / "abc"
    lora(run / "done" / "adapter", {M: randn(2, 12)}, {M: randn(5, 2)})
    (run / "late").mkdir()
    study = compared(tmp_path / "run")
    assert study.labels == ["done", "late"]
    assert [(s.unit1, s.part) for s in study.skipped if "neither adapter" in s.reason] == [("late", "all")]


def test_bases_that_differ_are_a_note_before_the_numbers(tmp_path):
    a, b = {M: randn(2, 12)}, {M: randn(5, 2)}
    study = compared(lora(tmp_path / "x", a, b), lora(tmp_path / "y", a, b, base="other"))
    assert any("different bases (other, tiny)" in note for note in study.notes)
    assert any("one pair" in note for note in study.notes)


class Block(nn.Module):
    """`model.layers.0.mlp.up_proj` of GPT-2's kind and a module without a matrix."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        block = nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": layer})})
        self.model = nn.ModuleDict({"layers": nn.ModuleList([block])})


def test_the_base_may_be_a_model_and_a_base_that_fits_nothing_is_refused(tmp_path):
    a, b = randn(2, 12), randn(5, 2, seed=1)
    found = units(lora(tmp_path / "x", {M: a}, {M: b}))
    linear = nn.Linear(12, 5)
    expected = merged_change(linear.weight, a, b, 1.0).direction
    study = compare_units(found, base=Block(linear))
    assert one(study.changes, "W", "direction") == pytest.approx(expected)

    class Conv1D(nn.Module):  # its weight is [K, N], as GPT-2's
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(linear.weight.detach().T.clone())

    study = compare_units(found, base=Block(Conv1D()))
    assert one(study.changes, "W", "direction") == pytest.approx(expected)
    study = compare_units(found, base=Block(nn.Linear(12, 6)))
    (left,) = study.skipped
    assert left.reason == "the base's weight is [6, 12] of torch.float32, not [5, 12] of a floating dtype"
    for wrong in ({"other": linear.weight}, nn.Linear(2, 2), Block(nn.ReLU())):
        refused("none of the adapted modules", compare_units, found, base=wrong)


def test_nothing_and_the_same_thing_twice_are_refused(tmp_path):
    refused("units is empty", compare_units, [])
    found = units(lora(tmp_path / "x", {M: randn(2, 12)}, {M: randn(5, 2)}))
    refused("given twice", compare_units, [*found, *units(tmp_path / "x")])


def test_progress_counts_modules(tmp_path):
    modules = [Q.format(0), UP.format(0), Q.format(1)]
    folder = lora(tmp_path / "x", {m: randn(2, 12) for m in modules}, {m: randn(5, 2) for m in modules})
    seen = []
    compared(folder, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
