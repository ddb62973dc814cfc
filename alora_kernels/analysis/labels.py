"""What things are called, in rows, tables, figures and reports alike: modules by layer and kind, units, measures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_NUMBER = re.compile(r"\d+")

CHANCE_OF = frozenset({"overlap"})  # measures that random matrices do not bring to zero
_MEASURES = {
    "cosine": "cosine of {}",
    "overlap": "subspace overlap of {}",
    "magnitude": "change of length, {}",
    "direction": "change of direction, {}",
    "frobenius": "norm of {}",
}


def named(part: str, measure: str) -> str:
    """A measure of a part in words."""
    template = _MEASURES.get(measure, f"{measure.replace('_', ' ')} of {{}}")
    return template.format("s B A" if part == "sBA" else part)


class Place(NamedTuple):
    """Where a module is: the first number in its name (None without one), and which of the layer's modules it is."""

    layer: int | None
    kind: str


def places(modules: Iterable[str]) -> dict[str, Place]:
    """Layer and kind of each module, in the order of a model: by layer, then by name.

    A kind is the shortest end of the name behind the layer number that no other kind ends in: `q_proj`, but in BERT
    `attention.output.dense` beside `intermediate.dense`.
    """
    split = {module: _split(module) for module in modules}
    kinds = _shortest_ends({tail for _, tail in split.values()})
    found = {module: Place(layer, kinds[tail]) for module, (layer, tail) in split.items()}
    return dict(sorted(found.items(), key=lambda item: (item[1].layer is None, item[1].layer or 0, item[0])))


def _split(module: str) -> tuple[int | None, tuple[str, ...]]:
    """The layer number and what comes after it; further numbers (experts) become `*`, so that they share a kind."""
    words = module.split(".")
    at = next((i for i, word in enumerate(words) if _NUMBER.fullmatch(word)), None)
    if at is None or at == len(words) - 1:
        return None, tuple(words)
    return int(words[at]), tuple("*" if _NUMBER.fullmatch(word) else word for word in words[at + 1 :])


def _shortest_ends(tails: set[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    names = {}
    for tail in tails:
        others = tails - {tail}
        lengths = (n for n in range(1, len(tail)) if not any(other[-n:] == tail[-n:] for other in others))
        names[tail] = ".".join(tail[-next(lengths, len(tail)) :])
    return names


def distinct(paths: Sequence[Sequence[str]]) -> list[str]:
    """A short label for each path, no two alike; a path's words go from special to general: task, folder, parent, ...

    The first word where it is enough; else `word/first` with the nearest word that tells those of one first word apart;
    else as many words as it takes, or a number.
    """
    labels = [path[0] for path in paths]
    for label in {label for label in labels if labels.count(label) > 1}:
        group = [i for i, path in enumerate(paths) if path[0] == label]
        for i, longer in zip(group, _apart([paths[i] for i in group]), strict=True):
            labels[i] = longer
    seen: dict[str, int] = {}
    for i, label in enumerate(labels):
        seen[label] = seen.get(label, 0) + 1
        labels[i] = label if seen[label] == 1 else f"{label} ({seen[label]})"
    return labels


def _apart(paths: Sequence[Sequence[str]]) -> list[str]:
    deepest = max(map(len, paths))
    for depth in range(1, deepest):
        words = [path[depth] if depth < len(path) else "" for path in paths]
        if len(set(words)) == len(words):
            return [f"{word}/{path[0]}".lstrip("/") for word, path in zip(words, paths, strict=True)]
    for depth in range(2, deepest + 1):
        longer = ["/".join(reversed(path[:depth])) for path in paths]
        if len(set(longer)) == len(longer):
            return longer
    return [path[0] for path in paths]
