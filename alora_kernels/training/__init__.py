"""A thin trainer for batches that mix tasks, and its parts."""

from .absent import KeepAbsentTasks
from .collator import TaskCollator
from .evaluate import answer_loss, choice_accuracy
from .tasks import TaskBalancedSampler
from .trainer import ALoRATrainer

__all__ = [
    "ALoRATrainer",
    "KeepAbsentTasks",
    "TaskBalancedSampler",
    "TaskCollator",
    "answer_loss",
    "choice_accuracy",
]
