"""`init-similarity`: are A alike because tasks are, or because they began alike? (ALoRA, Fig. 1)

Each seed trains three adapters: both tasks from one seed, the first also from another. The cosine compares entries and
so depends on the basis that the initialisation picked; the overlap of the spaces does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alora_kernels.analysis import cosine

from ..report.readme import markdown
from . import figures
from .config import Config
from .encoder import factors, study
from .numbers import Claim, Number, overlap, per_seed, pick, place_of, spread

SAME, SEEDS, BOTH = "two tasks, same seed", "same task, two seeds", "two tasks, two seeds"
OTHER = 1000  # added to a seed for its partner, so that seeds 0, 1, 2 stay independent of each other
SOURCE = "ALoRA, Fig. 1"


def cases(config: Config) -> list[str]:
    return ["lora"]


def run(config: Config, seed: int, case: str) -> list[Number]:
    first, second = config.tasks[:2]
    trained = {}
    for name, task, start in (("a", first, seed), ("b", second, seed), ("c", first, seed + OTHER)):
        learner = study(config, "lora", start, tasks=[task], data_seed=seed)
        learner.train(config)
        trained[name] = factors(learner.model)
    out = []
    for pair, left, right in ((SAME, "a", "b"), (SEEDS, "a", "c"), (BOTH, "b", "c")):
        for module, one in trained[left].items():
            for part in "AB":
                p, q, place = one[part], trained[right][module][part], place_of(module, part, pair)
                out += [Number(**place, measure="cosine", value=cosine(p, q)), overlap(place, p, q)]
    return out


def claims(rows: Sequence[Number]) -> list[Claim]:
    a, b = (
        {pair: per_seed(rows, part=part, item=pair, measure="overlap") for pair in (SAME, SEEDS, BOTH)} for part in "AB"
    )
    levels = [row.chance for row in pick(rows, part="A", measure="overlap") if row.chance is not None]
    level = sum(levels) / len(levels) if levels else 0.0

    def numbers(values: dict[str, list[float]]) -> str:
        return "overlap " + ", ".join(f"{spread(v)} ({pair})" for pair, v in values.items())

    return [
        Claim(
            "A are similar only under the same initialisation",
            SOURCE,
            "overlap of A with one seed over twice that with two seeds, for one task and for two",
            numbers(a),
            [s > 2 * max(t, u) for s, t, u in zip(*a.values(), strict=True)],
        ),
        Claim(
            "from different initialisations even one task gives unrelated A",
            SOURCE,
            "overlap of A with two seeds below twice chance",
            f"largest mean {max((max(v) for v in list(a.values())[1:] if v), default=0):.3f}, chance {level:.3f}",
            [max(t, u) < 2 * level for _, t, u in zip(*a.values(), strict=True)],
        ),
        Claim(
            "B's similarity is relatively stable across tasks and seeds",
            SOURCE,
            "largest of the three overlaps of B below twice the smallest",
            numbers(b),
            [max(v) < 2 * min(v) for v in zip(*b.values(), strict=True)],
        ),
    ]


def table(rows: Sequence[Number]) -> list[str]:
    columns = {f"{part}: {m}": {"part": part, "measure": m} for part in "AB" for m in ("cosine", "overlap")}
    pairs = (SAME, SEEDS, BOTH)
    lines = [[pair, *(spread(per_seed(rows, item=pair, **wanted)) for wanted in columns.values())] for pair in pairs]
    return markdown(["pair"], list(columns), lines)


def figure(rows: Sequence[Number], path: Path) -> None:
    panels = []
    for measure in ("overlap", "cosine"):
        for pair in (SAME, SEEDS, BOTH):
            chosen = pick(rows, item=pair, measure=measure)
            panels.append(figures.Panel(f"{measure}: {pair}", {p: pick(chosen, part=p) for p in "AB"}, 1.05))
    figures.by_layer(panels, path, columns=3)
