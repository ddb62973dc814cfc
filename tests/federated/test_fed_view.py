"""The live table: what it says, that it fits, that clients cannot write on the terminal, and a file that grows.

The figure: a PNG for every shape of run, the numbers behind the lines, names that do not overlap.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

pytest.importorskip("flwr", reason="needs the extra `federated`")

from matplotlib.figure import Figure

from alora_kernels.federated.log import Ledger, read
from alora_kernels.federated.view import SPACING, elapsed, plot, spark, spread, summary, table, watch
from tests.federated.ledgerfakes import (
    REASON,
    SILENT,
    client_event,
    judgement,
    one_round,
    run_event,
    whole_run,
    written,
)


def shown(renderable, width=100):
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(renderable)
    return [line.rstrip() for line in console.export_text().splitlines()]


def line_of(lines, name):
    (found,) = [line for line in lines if line.startswith(name + " ")]
    return found.split()


def watched(path, **options):
    """What `watch` prints where there is no terminal, and the events that it returns."""
    out = io.StringIO()
    events = watch(path, console=Console(file=out, width=80), **options)
    return out.getvalue().splitlines(), events


@pytest.fixture
def mixed(tmp_path):
    """Two rounds of a private run: bob's second reply is rejected, eve never answers."""
    return written(
        tmp_path / "mixed.jsonl",
        [
            run_event(("ann", "bob", "eve"), rounds=5),
            *one_round(1, {"ann": (0.25, 0.5), "bob": (0.5, 0.75)}, {"eve": SILENT}),
            {"event": "privacy", "round": 1, "epsilon": 0.5, "delta": 1e-5},
            *one_round(2, {"ann": (0.5, 0.625)}, {"bob": REASON, "eve": SILENT}),
            {"event": "privacy", "round": 2, "epsilon": 1.25, "delta": 1e-5},
        ],
    )


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_says_who_stands_where(mixed, width):
    lines = shown(table(mixed), width)
    head = " ".join(lines[:2])
    assert "fed-alora | 2/5 rounds | " in head
    assert "1.8 kB down, 600 B up | epsilon 1.250 at delta 1e-05 | accuracy" in head
    assert line_of(lines, "ann") == ["ann", "0.500", "0.625", "+0.125", "50", "600", "B", "200", "B", "▁█", "ok"]
    bob = line_of(lines, "bob")
    assert bob[:10] == ["bob", "0.500", "0.750", "+0.250", "50", "600", "B", "200", "B", "▁·"]
    assert bob[10] == "rejected:"
    eve = line_of(lines, "eve")
    assert eve[:4] == ["eve", "-", "-", "-"] and eve[-2:] == ["no", "reply"]
    assert line_of(lines, "mean") == ["mean", "0.500", "0.625", "+0.125"]
    assert line_of(lines, "worst")[-1] == "ann"
    assert line_of(lines, "delta-m")[1:3] == ["-100.0%", "-150.0%"]  # ann from 0.25 to 0.5 and 0.625
    assert f"round 2, bob: {REASON}" in lines
    assert max(map(len, lines)) <= width


def test_eighty_columns_hold_eight_clients(tmp_path):
    names = ["clinic", "lab", "ward", "pharmacy", "registry", "imaging", "a-site-with-a-long-name", "rehab"]
    events = [run_event(names, rounds=30)]
    big = {"bytes_down": 123_456_789, "bytes_up": 987_654_321, "examples": 12345}
    for k in range(1, 31):
        events += [client_event(k, name, 0.123, 0.456, **big) for name in names]
    lines = shown(table(written(tmp_path / "l", events)), 80)
    rows = lines[-8:]
    assert all(re.search(r"12345 3\.7 GB 29\.6 GB \S{8} ok$", row) for row in rows), rows
    assert rows[6].startswith("a-site-with-a…  0.123")


def test_before_the_first_round_and_a_client_that_was_not_asked(tmp_path):
    assert shown(table([])) == ["waiting for the run to begin"]
    lines = shown(table(written(tmp_path / "l", [run_event()])))
    assert "0/3 rounds" in lines[0]
    assert line_of(lines, "bob")[-1] == "waiting"
    assert not any(line.startswith("mean") for line in lines)
    events = [run_event(), *one_round(1, {"ann": (0.1, 0.2), "bob": (0.1, 0.2)}), *one_round(2, {"ann": (0.1, 0.2)})]
    assert line_of(shown(table(written(tmp_path / "m", events))), "bob")[-2:] == ["not", "asked"]


def test_a_loss_that_falls_is_green(tmp_path):
    events = [run_event(metric="loss", higher_is_better=False), *one_round(1, {"ann": (0.1, 0.2)})]  # loss 1.0 to 0.5
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    console.print(table(written(tmp_path / "l", events)))
    text = console.export_text(styles=True)
    assert "\x1b[32m-0.500" in text
    assert "\x1b[31m-0.500" not in text


def test_many_rejections_are_counted(tmp_path):
    names = [f"c{i}" for i in range(7)]
    lines = shown(table(written(tmp_path / "l", [run_event(names), *one_round(1, {}, dict.fromkeys(names, REASON))])))
    assert sum(REASON in line for line in lines) == 4
    assert lines[-1] == "and 3 more"


def test_clients_cannot_write_on_the_terminal(tmp_path):
    nasty = "\x1b[2J\x1b]0;owned\x07[bold red]x[/]\n\udcff\u202e"
    events = [run_event(), client_event(1, nasty, reason=nasty), *one_round(1, {"ann": (0.1, 0.2)}), *judgement(1, {})]
    events = written(tmp_path / "l", events)
    for renderable in (table(events), summary(events)):
        text = "\n".join(shown(renderable, 200))
        assert "[bold red]x[/]" in text  # not taken as markup
        assert not {"\x1b", "\x07", "\udcff", "\u202e"} & set(text)
    (line,), _ = watched(tmp_path / "l", until=lambda: True)
    assert "[bold red]x[/]" in line and "\x1b" not in line


def test_the_summary_compares_untuned_and_final(tmp_path):
    lines = shown(summary(written(tmp_path / "l", whole_run())))
    assert lines[0].endswith("| finished | accuracy")
    assert line_of(lines, "ann") == ["ann", "0.200", "0.500", "+0.300", "50", "1.2", "kB", "300", "B", "▁▃▆█", "0"]
    assert line_of(lines, "delta-m")[1:3] == ["+0.0%", "-112.5%"]  # +150 % and +75 %
    assert line_of(lines, "worst")[:4] == ["worst", "0.200", "0.500", "+0.300"]


def test_the_summary_of_a_stopped_run(mixed, tmp_path):
    end = {"event": "end", "round": 2, "status": "stopped", "reason": "too few clients", "time": mixed[-1]["time"]}
    lines = shown(summary([*mixed, end]), 140)
    assert "stopped: too few clients" in lines[0]
    assert line_of(lines, "ann")[2:4] == ["-", "-"]  # no final value without an evaluation
    assert f"eve: 2 x {SILENT}" in lines and f"bob: 1 x {REASON}" in lines
    assert shown(summary([])) == ["the ledger holds no run"]


# ---- pieces


@pytest.mark.parametrize(
    ("series", "end", "text"),
    [
        ({}, 0, "·"),
        ({0: 0.5}, 0, "▁"),
        ({0: 0.0, 1: 0.5, 2: 1.0}, 2, "▁▅█"),
        ({0: 0.0, 2: 1.0}, 2, "▁·█"),
        ({0: 1.0, 1: 1.0}, 1, "▁▁"),
        ({k: float(k) for k in range(100)}, 99, "▁▂▃▄▅▆▇█"),
    ],
)
def test_spark(series, end, text):
    assert spark(series, end) == text


def test_time_between_a_stop_and_a_resumption_does_not_count():
    start = datetime(2026, 1, 1, tzinfo=UTC)

    def at(seconds, name):
        return {"event": name, "time": (start + timedelta(seconds=seconds)).isoformat()}

    events = [at(0, "run"), at(10, "round"), at(1000, "run"), at(1005, "round")]
    assert elapsed(events) == 15
    assert elapsed(events, start + timedelta(seconds=1007)) == 17
    assert elapsed([*events, at(1006, "end")], start + timedelta(seconds=5000)) == 16
    assert elapsed([]) == 0


# ---- watching


class Writer:
    """Stands for the server: appends some lines whenever the watcher sleeps."""

    def __init__(self, path, events, lines_at_once=1):
        self.path, self.events, self.step, self.sleeps = path, list(events), lines_at_once, 0
        self.ledger = None

    def __call__(self, seconds):
        self.sleeps += 1
        assert self.sleeps < 200, "watch does not end"
        if self.sleeps == 1:
            return  # the file is not there yet
        if self.ledger is None:
            self.ledger = Ledger(self.path)
        for event in self.events[: self.step]:
            self.ledger.write(event)
        del self.events[: self.step]


def test_watch_prints_a_line_per_round_where_there_is_no_terminal(tmp_path):
    lines, events = watched(tmp_path / "l", sleep=Writer(tmp_path / "l", whole_run()))
    assert events == read(tmp_path / "l") and events[-1]["event"] == "end"
    assert lines[0] == ("fed-alora round 1/3: mean accuracy 0.300 -> 0.450, worst 0.350 (ann), 2 of 2 clients, 800 B")
    assert [line.split(":")[0] for line in lines] == [f"fed-alora round {k}/3" for k in (1, 2, 3)]


def test_a_plain_line_names_what_was_lost(tmp_path):
    silent = client_event(1, "bob", reason=SILENT) | {"client": None, "node": 9}
    *clients, closing = one_round(1, {"ann": (0.1, 0.2)}, {"eve": REASON})
    written(tmp_path / "l", [run_event(), *clients, silent, {**closing, "void": True}])
    assert watched(tmp_path / "l", until=lambda: True)[0][0].endswith(f", VOID; eve {REASON}; node 9 {SILENT}")


def test_watch_sees_what_was_written_before_until_became_true(tmp_path):
    writer = Writer(tmp_path / "l", whole_run()[:-1], lines_at_once=100)
    assert len(watched(tmp_path / "l", until=lambda: writer.ledger is not None, sleep=writer)[1]) == 13


def test_watch_on_a_terminal_ends_with_the_table(tmp_path):
    out = io.StringIO()
    console = Console(file=out, width=100, height=40, force_terminal=True, _environ={"TERM": "xterm"})
    watch(tmp_path / "l", console=console, sleep=Writer(tmp_path / "l", whole_run(), lines_at_once=3))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "waiting for the run to begin" in text
    assert [f"| {k}/3 rounds |" in text for k in (1, 2, 3)] == [True] * 3
    last = text[text.rindex("fed-alora |") :]
    assert "finished" in last and "delta-m" in last


def test_watch_of_a_file_that_was_cut_by_a_resumption_or_damaged(tmp_path):
    events = whole_run()
    written(tmp_path / "l", events)
    calls = []

    def resume(seconds):
        calls.append(seconds)
        with Ledger(tmp_path / "l", resume_from=1) as ledger:
            for event in [] if len(calls) == 1 else events[4:7]:
                ledger.write(event)

    lines, _ = watched(tmp_path / "l", until=lambda: len(calls) == 2, sleep=resume)
    assert [re.search(r"round (\d)", line)[1] for line in lines] == ["1", "2", "3", "2"]
    (tmp_path / "l").write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1"):
        watched(tmp_path / "l")


# ---- the figure


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
