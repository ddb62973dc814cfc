"""Checkpoints that are whole or not there, whatever ends the process that writes them; and which one to go on from."""

from __future__ import annotations

import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..tensor_file import DamagedFileError, verify

WRITING = ".writing"  # in the output folder: a checkpoint that is not finished


class WholeCheckpoints(Trainer):
    """A Trainer that writes checkpoints under another name and renames them; one that uploads them writes as ever."""

    _writing = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = str(super()._get_output_dir(trial))
        return os.path.join(folder, WRITING) if self._writing else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's."""
        self._writing = not self.args.push_to_hub
        try:
            super()._save_checkpoint(model, trial)
        finally:
            draft, self._writing = Path(self._get_output_dir(trial)), False
        if draft.name == WRITING:
            self.accelerator.wait_for_everyone()
            self._finish(draft, draft.parent)

    def _finish(self, draft: Path, folder: Path) -> None:
        """Rename the checkpoint; the state that lies in it, and that goes on, names the best one where it now is."""
        name, args = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", self.args
        if self.state.best_model_checkpoint == str(draft / name):
            self.state.best_model_checkpoint = str(folder / name)
            if args.should_save:
                self.state.save_to_json(str(draft / name / TRAINER_STATE_NAME))
        first = args.process_index == 0
        for mine in (first, not first and args.local_process_index == 0):  # another node may have a disk of its own
            if mine and (draft / name).is_dir():
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name)
                os.rename(draft / name, folder / name)
                shutil.rmtree(draft)
            self.accelerator.wait_for_everyone()
        if args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(folder), args.save_total_limit, best_model_checkpoint=best, use_mtime=True)


def check_best(args: Any) -> None:
    """Warn where the best step may fall between two checkpoints: Trainer keeps the last step then, without a word."""
    by_steps = args.eval_strategy == args.save_strategy == "steps"
    if args.load_best_model_at_end and by_steps and args.save_steps != args.eval_steps:
        often = f"judged every {args.eval_steps} steps and saved every {args.save_steps}"
        warnings.warn(
            f"load_best_model_at_end: {often}, the best step may be gone at the end, and another is kept:"
            f" save_steps={args.eval_steps} saves each that is judged",
            stacklevel=4,
        )


def newest_whole(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The last checkpoint of a run that training can go on from, and why not from later ones, by name."""
    found = {int(n): p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (n := p.name.rpartition("-")[2]).isdigit()}
    skipped: dict[str, str] = {}
    for _, checkpoint in sorted(found.items(), reverse=True):
        if not (why := damage(checkpoint)):
            return checkpoint, skipped
        skipped[checkpoint.name] = why
    return None, skipped


def damage(checkpoint: Path) -> str:
    """What is missing, cut short or changed in a checkpoint; nothing if it is whole."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))  # written last of all
        for path in checkpoint.rglob("*.safetensors"):
            verify(path)
        for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
            with zipfile.ZipFile(path) as archive:
                if (bad := archive.testzip()) is not None:
                    return f"{path.name} is damaged ({bad})"
    except FileNotFoundError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (DamagedFileError, zipfile.BadZipFile) as error:
        return str(error)
    except ValueError:
        return f"{TRAINER_STATE_NAME} is cut short"
    return ""
