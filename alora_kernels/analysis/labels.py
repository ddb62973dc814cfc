"""What measures are called, in figures, tables and the page: one name everywhere.

In:   (part, measure) of a row.
Out:  words.
Who:  `heatmaps`, `curves`, `report` and the command line.
"""

from __future__ import annotations

CHANCE_OF = frozenset({"overlap"})  # measures that random matrices do not bring to zero


class _Names(dict[tuple[str, str], str]):
    """(part, measure) -> words, for parts of any name."""

    def __missing__(self, key: tuple[str, str]) -> str:
        part, measure = key
        known = {
            "cosine": f"cosine of {part}",
            "overlap": f"subspace overlap of {part}",
            "magnitude": f"change of length, {part}",
            "direction": f"change of direction, {part}",
            "frobenius": f"norm of {part}",
        }
        return known.get(measure, f"{measure.replace('_', ' ')} of {part}")


NAMES = _Names({("sBA", "frobenius"): "norm of s B A", ("sBA", "effective_rank"): "effective rank of s B A"})

READING = (
    (
        "cosine",
        "The two matrices read as long vectors: 1 is the same direction, 0 none in common, −1 the opposite. It depends"
        " on the basis that the rank happens to have, so matrices that began with the same numbers stay alike, and"
        " matrices that began apart look apart even where they do the same.",
    ),
    (
        "subspace overlap",
        "How much of the space that one matrix spans lies in the other's: the mean squared cosine of the principal"
        " angles between the rows of A (which inputs are read) or the columns of B (which outputs are written). 1: the"
        " same space, 0: orthogonal. It does not depend on the basis. Random spaces reach max(r₁, r₂) / K, the level"
        " called chance: only what lies above it was learned together, or began together.",
    ),
    (
        "change of length and of direction",
        "Column by column, as in the analysis of DoRA: how much longer or shorter a column became, and 1 − cosine of"
        " the turn it made (0: none, 1: a right angle). Columns that are zero before or after have no direction.",
    ),
    (
        "effective rank",
        "How many directions of the weight's change s B A matter: exp of the entropy of its singular values. 1: a"
        " single direction, R: all that the rank allows, used equally.",
    ),
    (
        "norm",
        "The Frobenius norm: how large a matrix is. The norm of s B A says how far a task moves a weight.",
    ),
)
