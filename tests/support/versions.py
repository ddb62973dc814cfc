"""Requirements at the edges of what pyproject.toml allows, for `make newest` and `make oldest`.

`python tests/support/versions.py newest` prints every package without its bounds, one to a line: more than is allowed.
`oldest` prints those of `BOUNDED` at their lower bound. The package itself is then installed without its dependencies.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
BOUNDED = ("torch", "triton", "transformers", "peft", "flwr")  # what this package is built on, version by version
LEFT_OUT = {"mypy", "ruff", "playwright", "types-PyYAML"}  # no test of the core needs them


def requirements() -> list[Requirement]:
    """All of the package and its extras, in the order of pyproject.toml, itself left out."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    found = map(Requirement, lines)
    return [each for each in found if each.name not in {project["name"], *LEFT_OUT}]


def newest(requirement: Requirement) -> str:
    """Without its bounds."""
    requirement.specifier = SpecifierSet()
    return str(requirement)


def oldest(requirement: Requirement) -> str:
    """One of `BOUNDED` at its lower bound; any other as it is, but NumPy: beside 2.4 Triton 3.6 interprets no loop."""
    if requirement.name == "numpy":
        requirement.specifier = SpecifierSet("<2.4")
    if requirement.name in BOUNDED:
        (lower,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
        requirement.specifier = SpecifierSet(f"=={lower}")
    return str(requirement)


if __name__ == "__main__":
    print("\n".join(map({"newest": newest, "oldest": oldest}[sys.argv[1]], requirements())))
