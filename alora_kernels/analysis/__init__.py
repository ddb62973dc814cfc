"""Looking inside an adapter, numbers first: how alike tasks are, how far they moved, where they conflict.

    similarity, change    two matrices; how far one moved and what its update uses
    gradients, callback   which tasks pull a matrix in opposite directions; the same while training, to a CSV
    sources, comparison   folders as units; all of them compared, module by module
    table, report         what was found, as CSV; with figures, as one page

For users in Python and `alora analyze`. Importing this loads no library; `ConflictCallback` loads transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._lazy import names_later

if TYPE_CHECKING:
    from .callback import ConflictCallback
    from .change import Change, Spectrum, column_change, matrix_spectrum, merged_change, update_spectrum
    from .comparison import compare_units
    from .gradients import Conflicts, NotFiniteError, compare, probe_batches, task_conflicts, task_gradients
    from .report import write_report
    from .similarity import IncomparableError, chance, cosine, pairwise, subspace_overlap
    from .sources import Unit, units
    from .table import Analysis

_WHERE = {
    "IncomparableError": "similarity", "chance": "similarity", "cosine": "similarity", "pairwise": "similarity",
    "subspace_overlap": "similarity", "Change": "change", "Spectrum": "change", "column_change": "change",
    "matrix_spectrum": "change", "merged_change": "change", "update_spectrum": "change", "Conflicts": "gradients",
    "NotFiniteError": "gradients", "compare": "gradients", "probe_batches": "gradients", "task_conflicts": "gradients",
    "task_gradients": "gradients", "ConflictCallback": "callback", "Unit": "sources", "units": "sources",
    "compare_units": "comparison", "Analysis": "table", "write_report": "report",
}  # fmt: skip

__all__ = [
    "Analysis", "Change", "ConflictCallback", "Conflicts", "IncomparableError", "NotFiniteError", "Spectrum", "Unit",
    "chance", "column_change", "compare", "compare_units", "cosine", "matrix_spectrum", "merged_change", "pairwise",
    "probe_batches", "subspace_overlap", "task_conflicts", "task_gradients", "units", "update_spectrum", "write_report",
]  # fmt: skip

__getattr__ = names_later(__name__, _WHERE)
