"""What a run finds in the folder it writes to: nothing, an earlier run to go on with, or something it must not replace.

In:   the output folder, and what the user said to do with what is there.
Out:  the checkpoint to go on from; or a refusal that names the remedies, before anything is loaded.
Who:  `alora train` and `alora demo`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

ADAPTER, CONFLICTS = "adapter", "conflicts.csv"


def claim(folder: Path, *, resume: bool = False, overwrite: bool = False) -> str | None:
    """Make sure that nothing is replaced that the user did not mean to.

    Args:
        folder: where checkpoints and the adapter go.
        resume: go on with the run whose checkpoints are there.
        overwrite: what is there may go.

    Returns:
        The checkpoint to go on from; None starts anew.

    Raises:
        ValueError: a finished or begun run is there and neither was said, or there is nothing to resume.
    """
    if resume and overwrite:
        raise ValueError("--resume goes on with the run that is there, --overwrite starts anew: give one of them")
    place = folder.resolve()  # x/../run is run, even while there is no x
    if not next(p for p in (place, *place.parents) if p.exists()).is_dir():
        raise ValueError(f"output: {folder} is, or lies below, a file; give the path of a folder")
    last = get_last_checkpoint(str(place)) if place.is_dir() else None
    finished = (place / ADAPTER).is_dir() and any((place / ADAPTER).iterdir())
    if resume and last is None:
        again = "with --overwrite, or into another --output" if finished else "without --resume"
        raise ValueError(
            f"no checkpoint in {folder} to resume from: train {again}; save_steps in the recipe makes them"
        )
    if resume or overwrite:
        return last if resume else None
    if finished or last or (place / CONFLICTS).exists():
        what = f"a finished adapter, {folder / ADAPTER}" if finished else "a run that has begun"
        on = "--resume goes on from its last checkpoint, " if last else ""
        raise ValueError(f"{folder} holds {what}: {on}--overwrite replaces it, --output writes to another folder")
    return None


def clear(folder: Path) -> None:
    """Remove an earlier run's checkpoints and measurements, which would pass for the new one's.

    Its adapter stays until the new one takes its place.
    """
    for old in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(old)
    (folder / CONFLICTS).unlink(missing_ok=True)
