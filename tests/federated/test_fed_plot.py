"""Figures: a PNG for every shape of run, the numbers behind the lines, names that do not overlap."""

from __future__ import annotations

import itertools
import sys

import pytest

pytest.importorskip("flwr", reason="needs the extra `federated`")
pytest.importorskip("matplotlib", reason="matplotlib draws the figures")

from matplotlib.figure import Figure

from alora_kernels.federated.view import SPACING, plot, spread
from tests.federated.ledgerfakes import REASON, SILENT, one_round, run_event, whole_run

LOST = [
    run_event(("ann", "bob", "eve"), rounds=4),
    *one_round(1, {"ann": (0.2, 0.3), "bob": (0.4, 0.5)}, {"eve": SILENT}),
    *one_round(2, {"bob": (0.6, 0.7)}, {"ann": REASON, "eve": SILENT}),
    *one_round(4, {"ann": (0.4, 0.5), "bob": (0.8, 0.9)}, {"eve": SILENT}),  # round 3 is not in the ledger
]


@pytest.fixture
def figures(monkeypatch):
    """Figures that `plot` saved."""
    seen = []

    def savefig(self, *args, real=Figure.savefig, **kwargs):
        seen.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(
    "events",
    [
        pytest.param(whole_run(), id="run"),
        pytest.param(LOST, id="lost rounds and replies"),
        pytest.param(whole_run(clients=["ann"]), id="one client"),
        pytest.param(whole_run(rounds=1), id="one round"),
        pytest.param(whole_run(clients=[f"c{i}" for i in range(20)]), id="20 clients"),
        pytest.param([{**event, "bytes_up": 0, "bytes_down": 0} for event in whole_run()], id="nothing sent"),
        pytest.param([run_event()], id="no round"),
        pytest.param([run_event(())], id="nobody"),
        pytest.param([], id="empty"),
        pytest.param([*whole_run(clients=["$x^", "$\\frac$"]), run_event(method="costs $5 and $6\x1b")], id="awkward"),
    ],
)
def test_a_picture_of_everything(tmp_path, events):
    path = tmp_path / "figure.png"
    assert plot(events, path) == path
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") >= 800  # pixels wide


def test_the_lines_of_one_run(tmp_path, figures):
    plot(LOST, tmp_path / "f.png")
    metric, sent = figures[0].axes
    lines = {
        tuple(zip(line.get_xdata(), line.get_ydata()))
        for line in metric.lines
        if line.get_transform() == metric.transData
    }
    solid = [line for line in metric.lines if line.get_linestyle() == "-"]
    assert [list(line.get_xdata()) for line in solid] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 3]]  # ann, bob, mean
    ann, bob, mean = (list(line.get_ydata()) for line in solid)
    assert ann[0] == 0.2 and ann[3] == 0.4 and ann[1] != ann[1] and ann[2] != ann[2]  # gaps, not a line across
    assert bob[:2] == [0.4, 0.6]
    assert mean == pytest.approx([0.3, 0.4, 0.6])  # ann's last value stands in while she is missing
    assert ((1, 0.3), (4, 0.5)) in lines  # ann after local training
    crosses = [list(line.get_xdata()) for line in metric.lines if line.get_marker() == "x"]
    assert crosses == [[2], [], [1, 2, 4]]
    assert [text.get_text() for text in sent.texts] == ["ann", "bob", "eve"]


def test_final_evaluation_is_the_end_of_the_line(tmp_path, figures):
    plot(whole_run(), tmp_path / "f.png")
    solid = [line for line in figures[0].axes[0].lines if line.get_linestyle() == "-"]
    starts = (0.2, 0.4, 0.3)  # ann, bob, mean
    expected = [pytest.approx([start + 0.1 * k for k in range(4)]) for start in starts]
    assert [list(line.get_ydata()) for line in solid] == expected


def test_only_the_worst_of_many_clients_is_named(tmp_path, figures):
    plot(whole_run(clients=[f"c{i}" for i in range(9)]), tmp_path / "f.png")
    assert {text.get_text() for text in figures[0].axes[0].texts} == {"c0", "mean"}
    assert not figures[0].axes[1].texts


@pytest.mark.parametrize(
    "heights", [[], [0.5], [0.1, 0.9], [0.5, 0.5, 0.5], [0.1, 0.12, 0.5, 0.51, 0.9], [0.0, 0.06, 0.06, 0.11, 0.2]]
)
def test_names_at_line_ends_do_not_overlap(heights):
    placed = spread(heights)
    assert len(placed) == len(heights)
    assert all(b - a >= SPACING - 1e-9 for a, b in itertools.pairwise(placed))
    assert sum(placed) == pytest.approx(sum(heights))  # moved around where they were
    assert spread([0.1, 0.9]) == [0.1, 0.9]


def test_no_matplotlib_is_an_error(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'alora-kernels\[federated\]'"):
        plot(whole_run(), tmp_path / "f.png")
