"""What rows lose on their way from a source to token ids, counted so that it can be said.

In:   an empty `Lost`, passed to `load_tasks` and `encode`.
Out:  one line for each kind of loss.
Who:  `alora train`, `alora eval` and the demo print the lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Lost:
    """Counts by task, or by source where they concern a whole one.

    Attributes:
        repeated: rows left out because their task has the same prompt already.
        contradicting: those of them with another answer.
        limited: source -> (training rows taken, rows it has), where `train_size` leaves some out.
        capped: source -> (test rows taken, test rows asked for), where half of its rows are fewer.
        moved: test rows that train, since their task has no others.
        untrained: test rows left out because their task has no training row.
        cut: rows whose prompt lost its middle.
        encoded: rows turned into token ids.
        max_length: tokens that the cut rows were cut to.
    """

    repeated: Counter[str] = field(default_factory=Counter)
    contradicting: Counter[str] = field(default_factory=Counter)
    limited: dict[str, tuple[int, int]] = field(default_factory=dict)
    capped: dict[str, tuple[int, int]] = field(default_factory=dict)
    moved: Counter[str] = field(default_factory=Counter)
    untrained: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    encoded: Counter[str] = field(default_factory=Counter)
    max_length: int = 0

    def lines(self) -> list[str]:
        """One line for each kind of loss that occurred."""
        other = f" (with another answer: {_by(self.contradicting)})" if self.contradicting else ""
        cut = {task: (count, self.encoded[task]) for task, count in self.cut.items()}
        said = {
            f"repeated prompts left out: {_by(self.repeated)}{other}": self.repeated,
            f"training rows taken (train_size): {_of(self.limited)}": self.limited,
            f"test rows taken, at most half of all: {_of(self.capped, 'asked for')}": self.capped,
            f"test rows trained on, their task has no others: {_by(self.moved)}": self.moved,
            f"test rows of tasks without training rows left out: {_by(self.untrained)}": self.untrained,
            f"prompts cut in the middle to fit max_length={self.max_length}: {_of(cut)}": cut,
        }
        return [line for line, counts in said.items() if counts]


def _by(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _of(counts: Mapping[str, tuple[int, int]], what: str = "") -> str:
    return ", ".join(f"{name} {count} of {total} {what}".rstrip() for name, (count, total) in counts.items())
