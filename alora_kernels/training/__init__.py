"""A thin trainer for batches that mix tasks, and its parts."""

from .absent import KeepAbsentTasks
from .collator import TaskCollator
from .evaluate import choice_accuracy
from .sampler import TaskBalancedSampler
from .trainer import ALoRATrainer

__all__ = ["ALoRATrainer", "KeepAbsentTasks", "TaskBalancedSampler", "TaskCollator", "choice_accuracy"]
