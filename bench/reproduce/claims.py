"""What a paper says beside what came out here: a claim, our number, a verdict.

In:   for each seed whether the numbers agree, by a rule that is written beside the claim.
Out:  a `Claim`; a table of them.
Who:  the experiments make them, `docs` prints them.

A verdict is about this setting (a small encoder, a few hundred steps), never about the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NOT_RUN = "not run yet"


@dataclass(frozen=True)
class Claim:
    """One statement.

    Attributes:
        text: the paper's.
        source: paper and figure or table.
        rule: what we count as agreement, seed by seed.
        ours: our numbers, with their spread.
        agrees: for each seed, whether the rule is met.
    """

    text: str
    source: str
    rule: str
    ours: str
    agrees: Sequence[bool]

    @property
    def verdict(self) -> str:
        """In words, with the number of seeds where it says something."""
        met, seeds = sum(self.agrees), len(self.agrees)
        if not seeds:
            return NOT_RUN
        few = "; 1 seed, too few for a spread" if seeds == 1 else ""
        if met == seeds:
            return f"holds ({met} of {seeds} seeds{few})"
        if met == 0:
            return f"does not hold at this size ({met} of {seeds} seeds{few})"
        return f"undecided at this size ({met} of {seeds} seeds)"


def table(claims: Sequence[Claim]) -> list[str]:
    """The claims as lines of a Markdown table."""
    lines = ["| claim | from | counted as agreement | ours | verdict |", "|---|---|---|---|---|"]
    cells = [(c.text, c.source, c.rule, c.ours if c.agrees else NOT_RUN, c.verdict) for c in claims]
    return lines + [f"| {' | '.join(cell)} |" for cell in cells]
