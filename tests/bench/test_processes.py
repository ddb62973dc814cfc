"""`bench processes` without processes: what it writes, and that a way which is off is no success."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench import processes
from bench.__main__ import app

PAGE = f"a page\n<!-- {processes.BLOCK}:begin -->\n<!-- {processes.BLOCK}:end -->\n"


def pretend(monkeypatch: pytest.MonkeyPatch, **off: float) -> None:
    """Trainings that move one entry from 0 to 1, and by so much more in a way or number of processes."""

    def run(folder: Path, world: int, ways: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        shift = {way: off.get(way, 0.0) if world > 1 else 0.01 * ("bfloat16" in way) for way in ways}
        return {way: {"0 A": torch.zeros(2), "A": torch.tensor([1.0 + shift[way], 0.5])} for way in ways}

    monkeypatch.setattr(processes, "run", run)


@pytest.mark.parametrize(("off", "fine"), [({}, True), ({"FSDP2": 1e-3}, False), ({"DDP": 5e-6}, True)])
def test_the_page_is_written_if_all_agree(tmp_path, monkeypatch, off, fine):
    pretend(monkeypatch, **off)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    done = CliRunner().invoke(app, ["processes", "--page", str(page)])
    assert (done.exit_code == 0) == fine == ("| FSDP2 |" in page.read_text())
    assert all(f"| {way} |" in done.output for way in processes.WAYS)


def test_an_unknown_way_is_named():
    done = CliRunner().invoke(app, ["processes", "--way", "ZeRO"])
    assert done.exit_code == 2
    assert "ZeRO" in done.output


def test_the_measure_is_the_share_of_what_was_moved():
    one, other = ({"0 A": torch.tensor([1.0, 1.0]), "A": torch.tensor([3.0, value])} for value in (1.0, 1.5))
    assert processes.apart(one, other) == 0.25


def test_one_process_trains(tmp_path):
    found = processes.trained(tmp_path, 1)
    names = [name for name in found if not name.startswith("0 ")]
    assert names and all(not torch.equal(found[name], found[f"0 {name}"]) for name in names)
