"""The README's predictions: they say that they are, and `plot` puts them between their markers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="predictions run our launchers on meta tensors")

from bench import plot
from bench.static import predicted, roofline
from bench.static.roofline import Layer, Rates


def predictions() -> list[roofline.Prediction]:
    return list(roofline.predict_all(Rates(), [Layer("task", 8192, 4096, 4096), Layer("task", 64, 4096, 4096)]))


def test_the_first_line_says_predicted_and_every_plan_has_a_ratio() -> None:
    first, _, head, _, *lines = predicted.block(predictions(), Rates(tflops=700), "figure.png").splitlines()
    assert first.startswith("PREDICTED, not measured") and "700 TFLOP/s" in first
    assert all(f"`{plan}`" in head for plan in predicted.COLORS)
    table = [line for line in lines if line.startswith("| task")]
    assert len(table) == 3  # forward and backward, and decoding
    for line in table:
        assert all(1.0 <= float(cell) < 2.0 for cell in line.strip("|").split("|")[3:])


def test_plot_writes_them_between_their_markers(tmp_path: Path) -> None:
    text = "a\n<!-- bench-static:begin -->\nold\n<!-- bench-static:end -->\nb\n"
    new = plot.rewritten(text, {}, tmp_path)
    assert "PREDICTED, not measured" in new and "old" not in new
    assert new.startswith("a\n") and new.endswith("b\n")
    assert plot.rewritten("no markers", {}, tmp_path) == "no markers"
