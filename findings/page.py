"""Write docs/surprises.md from the scripts beside this file: `python findings/page.py`; with --check only compare.

A script's head says what was done, the guess and what was seen; `Guard:` names the test that holds ours to it. Titles
stand in README.md, pinned versions in the script's `pip install`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

TEST = re.compile(r"tests/[\w/]+\.py::\w+")
HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "surprises.md"
HEAD = """# What guesses get wrong

Behaviour of other packages, on valid input, that a good engineer would guess wrong, and that costs users right numbers
or days. Each was met while this package was made, and each is a script in `findings/` that installs pinned versions in
a folder of its own, shows it, and fails once it has changed; versions are those it ran with. None of it is a reproach:
these are the packages that we stand on.

Two more have no script. vLLM 0.32 on CPUs applies the last slot's adapter to rows of the base where `--max-loras`
is no larger than the number of tasks: showing it takes a server and minutes ([vLLM](evaluation_and_vllm.md#vllm)).
And float16 products are several times slower than float32's on CPUs without instructions for them, as fast on
others: a script would pass or fail by the machine ([Precision](precision.md)).

<!-- generated: python findings/page.py -->
"""
KINDS = {
    "PEFT and quantised bases": ("peft", "quanto", "bitsandbytes"),
    "transformers, accelerate, TRL": ("transformers", "trainer", "accelerate", "trl"),
    "torch and file formats": ("torch", "safetensors"),
    "Triton": ("triton",),
    "Flower": ("flower",),
    "vLLM": ("vllm",),
}


class Finding(NamedTuple):
    """What a script's head says."""

    name: str
    package: str
    title: str
    done: str
    guess: str
    seen: str
    guard: str
    versions: str


def titles() -> dict[str, tuple[str, str]]:
    """Script -> package and what it is about, from the table of README.md."""
    rows = re.findall(r"^\| `(\S+\.sh)` \| (\S+): (.+) \|$", (HERE / "README.md").read_text(), re.MULTILINE)
    return {name: (package, title) for name, package, title in rows}


def read(script: Path, package: str, title: str) -> Finding:
    """The parts of a script's head; ValueError where one is missing."""
    text = script.read_text()
    lines = [line.removeprefix("#").strip() for line in text.splitlines()[1:] if line.startswith("#")]
    head = " ".join(lines).split("Exits with 0 if")[0]
    found = re.fullmatch(r"(.+?) Guess: (.+?) Seen: (.+?)(?: Guard: (.+?))? ?", head)
    if found is None:
        raise ValueError(f"{script.name}: its head says no `Guess:` and `Seen:`")
    pins = re.findall(r"\b([a-z][\w-]*==[\w.]+)", text)
    guard = found[4] or ""
    return Finding(script.name, package, title, found[1], found[2], found[3], guard, ", ".join(dict.fromkeys(pins)))


def guards(finding: Finding) -> list[str]:
    """Tests that a guard names, as `tests/file.py::test_name`."""
    return TEST.findall(finding.guard)


def findings() -> list[Finding]:
    """All of them; ValueError for a script without a title, or a title without a script."""
    known = titles()
    there = {script.name for script in HERE.glob("*.sh")}
    if known.keys() != there:
        raise ValueError(f"README.md and the scripts differ: {', '.join(sorted(known.keys() ^ there))}")
    return [read(HERE / name, *known[name]) for name in sorted(known)]


def page() -> str:
    """The page, a chapter per kind of package."""
    parts = [HEAD]
    everything = findings()
    if lost := [f.name for f in everything if not f.name.startswith(tuple(p for kind in KINDS.values() for p in kind))]:
        raise ValueError(f"in no chapter of KINDS: {', '.join(lost)}")
    for chapter, prefixes in KINDS.items():
        found = [finding for finding in everything if finding.name.startswith(prefixes)]
        if found:
            parts.append(f"## {chapter}\n")
        for finding in found:
            parts.append(f"### {finding.title[0].upper()}{finding.title[1:]}\n")
            parts.append(f"{finding.done}\n")
            parts.append(f"- **One guesses:** {finding.guess}")
            parts.append(f"- **What happens:** {finding.seen}")
            if finding.guard:
                parts.append(f"- **Our guard:** {TEST.sub(lambda test: f'`{test[0]}`', finding.guard)}")
            parts.append(f"- `findings/{finding.name}`: {finding.versions}\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or compare."""
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE.name} is not what the scripts say: run python findings/page.py")


if __name__ == "__main__":
    main()
