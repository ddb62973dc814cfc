"""Looking inside an adapter: numbers first.

In:   matrices A and B, base weights, gradients.
Out:  plain numbers and frozen records, computed in float64.
Who:  users in Python, `alora analyze`.

    similarity      two matrices as vectors and as subspaces, with the level of chance
    change          how far columns moved, in length and in direction
    spectrum        singular values of s B A, effective and stable rank
    gradients       which tasks pull a matrix in opposite directions
    callback        the same while training, to a CSV
    sources, study  folders as units; all of them compared, module by module
    result, report  what was found, as CSV; with figures, as one page

Importing this loads no library; `ConflictCallback` loads transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import names_later

if TYPE_CHECKING:
    from .callback import ConflictCallback
    from .change import Change, column_change, merged_change
    from .gradients import Conflicts, NotFiniteError, compare, probe_batches, task_conflicts, task_gradients
    from .report import write_report
    from .result import Analysis
    from .similarity import IncomparableError, chance, cosine, pairwise, subspace_overlap
    from .sources import units
    from .spectrum import Spectrum, matrix_spectrum, update_spectrum
    from .study import compare_units
    from .units import Unit

_WHERE = {
    "Analysis": "result",
    "Change": "change",
    "ConflictCallback": "callback",
    "Conflicts": "gradients",
    "IncomparableError": "similarity",
    "NotFiniteError": "gradients",
    "Spectrum": "spectrum",
    "Unit": "units",
    "chance": "similarity",
    "column_change": "change",
    "compare": "gradients",
    "compare_units": "study",
    "cosine": "similarity",
    "matrix_spectrum": "spectrum",
    "merged_change": "change",
    "pairwise": "similarity",
    "probe_batches": "gradients",
    "subspace_overlap": "similarity",
    "task_conflicts": "gradients",
    "task_gradients": "gradients",
    "units": "sources",
    "update_spectrum": "spectrum",
    "write_report": "report",
}

__all__ = [
    "Analysis",
    "Change",
    "ConflictCallback",
    "Conflicts",
    "IncomparableError",
    "NotFiniteError",
    "Spectrum",
    "Unit",
    "chance",
    "column_change",
    "compare",
    "compare_units",
    "cosine",
    "matrix_spectrum",
    "merged_change",
    "pairwise",
    "probe_batches",
    "subspace_overlap",
    "task_conflicts",
    "task_gradients",
    "units",
    "update_spectrum",
    "write_report",
]

__getattr__ = names_later(__name__, _WHERE)
