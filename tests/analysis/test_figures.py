"""What is drawn: a picture for every measure that has numbers, in words too, on light and on dark paper."""

from __future__ import annotations

import io

import pytest
import torch

from alora_kernels.analysis import figures
from alora_kernels.analysis.gradients import COLUMNS, share_of

from ..support.adapters import alora, lora
from .adapters import UP, compared, randn, study_of, vera

pytest.importorskip("matplotlib", reason="figures need matplotlib")
from PIL import Image

TASKS = ("math", "code", "law")


def drawn(study):
    return {picture.name: picture for picture in figures.pictures(study)}


def test_every_measure_with_numbers_has_a_picture(tmp_path):
    found = drawn(study_of(tmp_path / "a", TASKS))
    assert list(found) == [
        "similarity", "layers-A-cosine", "layers-A-overlap", "similarity-layers", "changes-layers", "update-layers",
        "norms-units",
    ]  # fmt: skip
    for picture in found.values():
        light, dark = (Image.open(io.BytesIO(data)).convert("RGB") for data in (picture.light, picture.dark))
        assert light.size == dark.size and abs(light.width - 1.5 * picture.width) <= 2
        assert light.getpixel((1, 1)) == (255, 255, 255) and sum(dark.getpixel((1, 1))) < 150
        assert len(light.getcolors(2**24)) > 20
        assert picture.title and picture.caption and picture.alt


def test_words_name_the_extremes_and_the_level_of_chance(tmp_path):
    p, q = torch.eye(8)[:2], torch.eye(8)[2:4]
    a = {UP.format(n): torch.stack([p, p, q]) for n in range(2)}
    found = drawn(compared(alora(tmp_path / "a", ["x", "y", "z"], a, {m: randn(6, 2) for m in a})))
    assert "subspace overlap of A: highest x with y, 1.000; lowest x with z, 0.000" in found["similarity"].alt
    assert "subspace overlap of A 0.250" in found["similarity"].caption
    assert "chance 0.250" in found["similarity-layers"].alt
    assert "mean over 3 pairs" in found["similarity-layers"].caption


def test_one_pair_says_that_there_is_no_spread(tmp_path):
    assert "no spread" in drawn(study_of(tmp_path / "a", ("x", "y")))["similarity-layers"].caption


def test_one_unit_and_vectors_and_modules_without_numbers(tmp_path):
    single = drawn(study_of(tmp_path / "a", ("x",)))
    assert "similarity" not in single and "update-layers" in single
    both = compared(*(vera(tmp_path / n, {UP.format(0): randn(2)}, {UP.format(0): randn(6)}) for n in "pq"))
    assert set(drawn(both)) == {"similarity", "similarity-layers", "changes-layers", "norms-units"}
    flat = compared(*(lora(tmp_path / n, {"up": randn(2, 8)}, {"up": randn(6, 2)}) for n in "rs"))
    assert set(drawn(flat)) == {"similarity"}


def test_names_cannot_become_formulas_and_many_units_fit(tmp_path):
    names = ["$\\frac{1}{0}$", *(f"a task with quite a long name, number {i}" for i in range(19))]
    found = drawn(study_of(tmp_path / "a", names, layers=2))
    assert Image.open(io.BytesIO(found["similarity"].light)).width < 3000


def test_conflicts_are_drawn_from_the_file_beside_the_adapter(tmp_path):
    lines = [",".join(COLUMNS)]
    for step in (10, 20):
        for n in range(2):
            lines += [f"{step},base_model.model.{UP.format(n)},A,per task,0.5,0,0"]
            lines += [f"{step},base_model.model.{UP.format(n)},B,shared,0.25,{n},3"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "conflicts.csv").write_text("\n".join(lines))
    (tmp_path / "run" / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "run" / "image.csv").write_bytes(b"\xff\xfe\x00")
    folder = alora(tmp_path / "run" / "adapter", ["x"], {UP.format(0): randn(1, 2, 8)}, {UP.format(0): randn(6, 2)})
    study = compared(folder)
    (file,) = study.conflicts
    assert file.why == "" and len(file.rows) == 8 and share_of(file.rows) == pytest.approx(1 / 6)
    picture = drawn(study)["conflicts"]
    assert "up_proj B 0.167" in picture.alt and "up_proj A 0.5" in picture.alt
    (folder / "broken.csv").write_text("\n".join([*lines, "30,short"]))
    (folder / "empty.csv").write_text(lines[0])
    whys = [file.why for file in compared(folder).conflicts]
    assert "does not read as gradient conflicts" in whys[0] and "no row" in whys[1] and whys[2] == ""


def test_a_and_b_of_one_kind_have_one_colour_and_b_is_drawn_through():
    theme = {"soft": "#777777"}
    kinds = [f"kind {i}" for i in range(9)]
    looks = {f"{kind} {part}": (kind, part) for kind in kinds for part in "AB"}
    styles = figures._styles(looks, theme)
    assert all(styles[f"{kind} A"]["color"] == styles[f"{kind} B"]["color"] for kind in kinds)
    assert styles["kind 0 B"]["linestyle"] == "-" and styles["kind 0 A"]["linestyle"] == "--"
    alone = figures._styles({kind: (kind, "") for kind in kinds}, theme)
    assert len({tuple(style.values()) for style in alone.values()}) == len(kinds)
