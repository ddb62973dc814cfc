#!/usr/bin/env bash
# An IterableDataset in accelerate's data loader: what arrives of a batch that holds more than rows?
# Guess: the batch that the collator returned; a tensor of another length than the number of rows passes, or is refused.
# Seen: every tensor of the batch is cut to the number of rows, without a word, also in a single process. Here the
# collator says `logits_to_keep=[5, 6, 7]` for 2 rows and the model gets [5, 6]: whoever takes the loss of the last
# positions compares other positions. The same rows as a map-style dataset arrive whole.
# Guard: no batch of ours holds a tensor whose length is not that of its rows
# (tests/training/test_trainer_data.py::test_a_stream_trains_on_the_models_own_loss).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 accelerate==1.15.0
cd "$work" && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import accelerate
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

ROWS = [torch.arange(8), torch.arange(8) + 8]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Map(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


def collate(rows):
    return {"input_ids": torch.stack(rows), "logits_to_keep": torch.tensor([5, 6, 7])}


seen = {}
for dataset in (Stream(), Map()):
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(dataset, batch_size=2, collate_fn=collate))
    seen[type(dataset).__name__] = next(iter(loader))["logits_to_keep"].tolist()
print(f"torch {torch.__version__}, accelerate {accelerate.__version__}:", seen)
raise SystemExit(seen != {"Stream": [5, 6], "Map": [5, 6, 7]})
PYTHON
