"""The file formats of the data packages, one reader each.

In:   a path inside an installed data package.
Out:  an iterator of `(text, label)`; label is the English word the model shall answer.
Who:  the registry in `tasks`, which names one reader per task.

Readers keep the order of the file, drop rows without a clear label and never deduplicate: splitting,
shuffling and deduplication happen once, in `loading`, for every source alike.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path

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
