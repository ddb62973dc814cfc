"""docs/versions.md says what pyproject.toml allows; `make newest` and `make oldest` install its edges."""

from __future__ import annotations

from packaging.requirements import Requirement

from tests.support.versions import BOUNDED, PROJECT, newest, oldest, requirements

PAGE = PROJECT.parent / "docs" / "versions.md"


def bounds(requirement: Requirement) -> tuple[str, str]:
    found = {bound.operator: bound.version for bound in requirement.specifier}
    return found.get(">=", ""), found.get("<", "")


def test_the_page_has_the_bounds_of_pyproject() -> None:
    cells = [
        line.split("|")[1:4]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and "package" not in line
    ]
    page = {name.strip(): (low.strip(), high.strip()) for name, low, high in cells}
    allowed = {each.name: bounds(each) for each in requirements()}
    assert page == {name: allowed[name] for name in page}
    assert {name for name, (_, high) in allowed.items() if high} <= page.keys()


def test_edges() -> None:
    assert newest(Requirement('flwr[dp]>=1.41,<1.42; python_version > "3"')) == 'flwr[dp]; python_version > "3"'
    assert oldest(Requirement("peft>=0.21,<0.22")) == "peft==0.21"
    assert oldest(Requirement("typer")) == "typer"
    assert set(BOUNDED) <= {each.name for each in requirements()}
