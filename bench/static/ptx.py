"""Rules that PTX must keep where programs or instructions run beside each other; the compiler knows none of them.

`hazards` names each line that breaks one: what a flag stands for is stored by all warps before one thread raises it,
what other programs stored is read after an acquire and never through a cache that may be stale, and registers that a
product in flight still reads are not written. A launch that may begin before the one before it is finished
(`kernels.overlapping`) waits for it in every thread, and until then neither reads what that one stores nor stores.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_REGISTER = re.compile(r"%\w+")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)")
_STORE = re.compile(r"(st|red|atom)\.(?!shared)|cp\.async\.bulk\S*\.global\.shared")
_RELEASE = re.compile(r"(red|atom)\.\S*(release|acq_rel)")
_ACQUIRE = re.compile(r"(ld|atom)\.\S*acquire")
_READ = re.compile(r"ld\.(global|volatile|relaxed|acquire|b|u|s|f|v)|cp\.async|prefetch")
_NO_RESULT = re.compile(
    r"st\.|red\.|bar|bra|ret|fence|membar|wgmma|cp\.|prefetch|mbarrier|tcgen05|griddepcontrol|nanosleep"
)


class Line(NamedTuple):
    """An instruction without its predicate, or a label."""

    op: str
    operands: str
    label: str = ""

    @property
    def text(self) -> str:
        return f"{self.op} {self.operands}".strip()


def parse(ptx: str) -> list[Line]:
    """Instructions and labels of the kernel's body, in the order of the text."""
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index("{", ptx.index(".entry")) :])
    found = []
    for raw in re.split(r"[;\n]", body):
        line = re.sub(r"^[{}\s]*(@!?%?\w+\s+)?", "", raw).strip()
        if match := re.fullmatch(r"(\$\w+):.*", line):
            found.append(Line("", "", match[1]))
        elif line and not line.startswith((".", "$", "%", "}")):
            op, _, operands = line.partition(" ")
            found.append(Line(op.strip(), operands.strip()))
    return found


def hazards(ptx: str, awaited: int | None = None) -> list[str]:
    """What a kernel's PTX does that it must not, in words; empty for most.

    `awaited`: of a launch that overlaps the one before it, which of its pointers the other one stores to, from 0.
    """
    lines = parse(ptx)
    early = () if awaited is None else _too_early(lines, ptx, _pointer_names(ptx)[awaited])
    return [*_unguarded_releases(lines), *_stale_reads(lines, ptx), *_overwritten_operands(lines), *early]


def _unguarded_releases(lines: Sequence[Line]) -> Iterator[str]:
    """Releases that stores of other warps may come after: no barrier between the last store and the release."""
    for place, line in enumerate(lines):
        if not _RELEASE.match(line.op):
            continue
        for before in reversed(lines[:place]):
            if before.op.startswith(("bar.sync", "barrier.sync")):
                break
            if _STORE.match(before.op):
                yield f"a store between barrier and release: {before.text}"
                break
        else:
            yield f"a release that no barrier precedes: {line.text}"


def _pointer_names(ptx: str) -> list[str]:
    """The pointer arguments of the kernel, in order."""
    return re.findall(r"\.ptr\s[^,)]*?(\w+)\s*[,)]", ptx[: ptx.index("{", ptx.index(".entry"))])


def _pointers(lines: Sequence[Line], ptx: str) -> dict[str, set[str]]:
    """From which pointer arguments each 64-bit register was computed."""
    pointers = set(_pointer_names(ptx))
    roots: dict[str, set[str]] = {}
    grows = True
    while grows:
        grows = False
        for line in lines:
            names = _REGISTER.findall(line.operands)
            if not names or not names[0].startswith("%rd") or _NO_RESULT.match(line.op):
                continue
            if line.op.startswith("ld"):
                known = pointers.intersection(re.findall(r"\w+", line.operands)) if ".param" in line.op else set()
            else:
                known = set().union(*(roots.get(name, set()) for name in names[1:]))
            if not known <= roots.setdefault(names[0], set()):
                roots[names[0]] |= known
                grows = True
    return roots


def _stale_reads(lines: Sequence[Line], ptx: str) -> Iterator[str]:
    """Reads of memory that the same launch stores: before any acquire, asynchronous, or through the read-only cache."""
    if not any(_RELEASE.match(line.op) for line in lines):
        return
    roots = _pointers(lines, ptx)

    def touched(line: Line) -> set[str]:
        return set().union(*(roots.get(register, set()) for register in _ADDRESS.findall(line.operands)))

    stored = set().union(*(touched(line) for line in lines if line.op.startswith("st.") and ".shared" not in line.op))
    acquired = False
    for line in lines:
        acquired |= bool(_ACQUIRE.match(line.op))
        if _READ.match(line.op) and touched(line) & stored:
            if not acquired:
                yield f"read before an acquire: {line.text}"
            elif ".nc" in line.op or line.op.startswith(("cp.async", "prefetch")):
                yield f"read past the acquire: {line.text}"


def _too_early(lines: Sequence[Line], ptx: str, awaited: str) -> Iterator[str]:
    """What a launch does before the one before it is finished, which stores to the pointer `awaited`."""
    wait = next((place for place, line in enumerate(lines) if line.op == "griddepcontrol.wait"), None)
    if wait is None or re.search(r"@!?%\w+\s+griddepcontrol\.wait", ptx):
        yield "not every thread waits for the launch before"
        return
    roots = _pointers(lines, ptx)
    labels = {line.label: place for place, line in enumerate(lines) if line.label}
    reads = [
        (place, line)
        for place, line in enumerate(lines)
        if _READ.match(line.op) and any(awaited in roots.get(name, ()) for name in _ADDRESS.findall(line.operands))
    ]
    for line in lines[:wait]:
        if line.op in ("ret", "exit") or (line.op.startswith("bra") and labels.get(line.operands.strip(), 0) > wait):
            yield f"a way round the wait for the launch before: {line.text}"
        if _STORE.match(line.op):
            yield f"a store before the wait for the launch before: {line.text}"
    for place, line in reads:
        if place < wait:
            yield f"read before the wait for the launch before: {line.text}"
        elif ".nc" in line.op:
            yield f"read through a cache that may be stale: {line.text}"
    if not reads:
        yield "nothing of what it waits for is read: the rule does not understand this kernel"


def _overwritten_operands(lines: Sequence[Line]) -> Iterator[str]:
    """Registers written while a product of a warpgroup may still read them, here or on the next turn of a loop."""
    labels = {line.label: place for place, line in enumerate(lines) if line.label}
    for end, line in enumerate(lines):
        start = labels.get(line.operands.strip(), end) if line.op.startswith("bra") else end
        body = lines[start:end]
        if any(step.op.startswith("wgmma.mma_async") for step in body):
            yield from _overwritten([*body, *body])


def _overwritten(lines: Sequence[Line]) -> Iterator[str]:
    flying: list[set[str]] = []
    group: set[str] = set()
    for line in lines:
        if line.op.startswith("wgmma.mma_async"):
            # {accumulators}, {registers of the left operand} or its descriptor, descriptor of the right one
            _, _, rest = line.operands.partition("}")
            group |= set(_REGISTER.findall(rest[: rest.index("}")])) if "{" in rest else set()
        elif line.op.startswith("wgmma.commit_group"):
            flying, group = [*flying, group], set()
        elif line.op.startswith("wgmma.wait_group"):
            kept = int(line.operands)
            flying = flying[-kept:] if kept else []
        elif not _NO_RESULT.match(line.op):
            first = line.operands.split("}")[0] if line.operands.startswith("{") else line.operands.split(",")[0]
            if set(_REGISTER.findall(first)) & set().union(group, *flying):
                yield f"overwrites the operand of a product in flight: {line.text}"
                return
