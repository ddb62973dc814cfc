"""docs/surprises.md says what the scripts of findings/ say, and the guards that it names are tests."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("findings_page", REPOSITORY / "findings" / "page.py")
assert spec is not None and spec.loader is not None
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)
FINDINGS = page.findings()


def test_the_page_is_that_of_the_scripts():
    assert (REPOSITORY / "docs" / "surprises.md").read_text() == page.page(), "run python findings/page.py"


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.name)
def test_a_guard_is_a_test_and_versions_are_pinned(finding):
    assert finding.versions
    for guard in page.guards(finding):
        file, name = guard.split("::")
        assert re.search(rf"def {name}\b", (REPOSITORY / file).read_text()), f"{finding.name}: {guard} is no test"
    assert not finding.guard or page.guards(finding)


def test_a_script_without_its_line_in_the_table_is_named(monkeypatch):
    monkeypatch.setattr(page, "titles", lambda: {FINDINGS[0].name: ("x", "y")})
    with pytest.raises(ValueError, match=FINDINGS[1].name):
        page.findings()


def test_no_script_is_left_out_of_the_page(monkeypatch):
    text = page.page()
    assert all(f"`findings/{finding.name}`" in text for finding in FINDINGS)
    monkeypatch.setattr(page, "KINDS", {"PEFT": ("peft",)})
    with pytest.raises(ValueError, match=r"in no chapter of KINDS: .*trainer_resumes_a_finished_run\.sh"):
        page.page()
