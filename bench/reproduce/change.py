"""`before-after`: what training moves, A or B, length or direction? (ALoRA, Fig. 2)

LoRA on each task by itself. B begins at zero and has no direction there, so A and B are compared with the state after a
tenth of the steps as well. Who turns W0: with A put back to its start, how much of the turn is left?
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from alora_kernels.analysis import column_change, cosine, merged_change

from ..report.readme import markdown
from . import figures
from .config import Config
from .encoder import base_weights, factors, study
from .numbers import Claim, Number, overlap, per_seed, pick, place_of, spread

SOURCE = "ALoRA, Fig. 2"
START, EARLY, W0, KEPT = "start", "early", "W0", "W0, A as at its start"


def cases(config: Config) -> list[str]:
    return list(config.names)


def run(config: Config, seed: int, case: str) -> list[Number]:
    task = config.tasks[config.names.index(case)]
    learner = study(config, "lora", seed, tasks=[task])
    states = {}
    early = max(1, round(config.early * config.number("steps")))

    def look(step: int) -> None:
        if step in (0, early):
            states[START if step == 0 else EARLY] = factors(learner.model)

    learner.train(config, look)
    now, weights = factors(learner.model), base_weights(config)
    scaling = (config.lora_alpha or 2 * config.number("r")) / config.number("r")
    out = []
    for module, end in now.items():
        start, then = states[START][module], states[EARLY][module]
        for part, before, name in (("A", start, START), ("A", then, EARLY), ("B", then, EARLY)):
            out += _moved(place_of(module, part, name), before[part], end[part])
        for name, a in ((W0, end["A"]), (KEPT, start["A"])):
            change = merged_change(weights[module].cpu(), a, end["B"], scaling)
            out += [
                Number(**place_of(module, "W", name), measure=m, value=getattr(change, m))
                for m in ("relative_magnitude", "direction")
            ]
    return out


def _moved(place: dict[str, Any], before: Tensor, after: Tensor) -> list[Number]:
    """Similarity to an earlier state, and change of the columns."""
    change = column_change(before, after)
    values = {"cosine": cosine(before, after)}
    values |= {"relative_magnitude": change.relative_magnitude, "direction": change.direction}
    return [*(Number(**place, measure=m, value=v) for m, v in values.items()), overlap(place, before, after)]


def _of(rows: Sequence[Number], part: str, item: str, measure: str) -> list[float]:
    return per_seed(rows, part=part, item=item, measure=measure)


def claims(rows: Sequence[Number]) -> list[Claim]:
    stays = _of(rows, "A", START, "cosine")
    a, b = _of(rows, "A", EARLY, "direction"), _of(rows, "B", EARLY, "direction")
    longer = {part: _of(rows, part, EARLY, "relative_magnitude") for part in "AB"}
    length = _of(rows, "W", W0, "relative_magnitude")
    turned, kept = _of(rows, "W", W0, "direction"), _of(rows, "W", KEPT, "direction")
    share = [k / t for k, t in zip(kept, turned, strict=True)]
    return [
        Claim(
            "A remains largely unchanged from its initialisation",
            SOURCE,
            "cosine to its start above 0.9",
            f"cosine {spread(stays)}, overlap {spread(_of(rows, 'A', START, 'overlap'))}",
            [value > 0.9 for value in stays],
        ),
        Claim(
            "B changes far more than A, in length and in direction",
            SOURCE,
            "from the early state to the end both changes of B over twice those of A",
            f"direction {spread(b)} against {spread(a)}, length {spread(longer['B'])} against {spread(longer['A'])}",
            [q > 2 * p and m > 2 * n for p, q, n, m in zip(a, b, longer["A"], longer["B"], strict=True)],
        ),
        Claim(
            "LoRA changes the length of W0's columns little",
            SOURCE,
            "mean relative change below 5 %",
            spread([100 * v for v in length], ".2f") + " %",
            [value < 0.05 for value in length],
        ),
        Claim(
            "nearly all change of direction is captured by B",
            SOURCE,
            "with A put back to its start, over 80 % of the turn of W0 is left",
            spread([100 * v for v in share], ".1f") + " %",
            [value > 0.8 for value in share],
        ),
    ]


def table(rows: Sequence[Number]) -> list[str]:
    lines = []
    for part, item in (("A", START), ("A", EARLY), ("B", EARLY), ("W", W0), ("W", KEPT)):
        found = [_of(rows, part, item, m) for m in ("cosine", "overlap", "relative_magnitude", "direction")]
        lines.append([part, item, *(spread(v, ".4f" if part == "W" else ".3f") if v else "" for v in found)])
    return markdown(["matrix", "against"], ["cosine", "overlap", "length", "direction"], lines)


def figure(rows: Sequence[Number], path: Path) -> None:
    series = {"A, from its start": ("A", START), "A, from early": ("A", EARLY), "B, from early": ("B", EARLY)}
    panels = [
        figures.Panel(title, {n: pick(rows, part=p, item=i, measure=m) for n, (p, i) in series.items()})
        for title, m in (
            ("overlap with the earlier state", "overlap"),
            ("relative change of length", "relative_magnitude"),
            ("change of direction", "direction"),
        )
    ]
    turned = {n: pick(rows, part="W", item=n, measure="direction") for n in (W0, KEPT)}
    panels.append(figures.Panel("W0 + sBA: change of direction", turned))
    figures.by_layer(panels, path, columns=2)
