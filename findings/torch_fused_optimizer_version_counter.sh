#!/usr/bin/env bash
# torch: an optimiser steps between forward and backward, in its plain, its foreach and its fused form.
# Guess: all three write parameters in place and raise their version counters, so each backward refuses: a tensor that
# it needs was changed.
# Seen: the fused form (SGD, Adam, AdamW, on a CPU too) leaves the counters as they were. The backward runs and gives a
# gradient that is neither that of the old weight nor that of the new one: products saved in the forward are old, the
# weight is new. transformers' Trainer takes the fused AdamW by default. Whoever asks a counter whether a weight is
# still the same, as caches of converted weights do, is told yes.
# Guard: copies of weights that are packed are compared with the weight itself where it can be trained
# (tests/ops/test_packed.py::test_a_changed_weight_is_packed_anew).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
import torch

seen = {}
for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
    for form in ("plain", "foreach", "fused"):
        weight = torch.nn.Parameter(torch.tensor([3.0]))
        cube = (weight * weight * weight).sum()
        weight.grad = torch.ones(1)
        optimizer = kind([weight], lr=1.0, **({} if form == "plain" else {form: True}))
        version, old = weight._version, weight.item()
        optimizer.step()
        raised, weight.grad = weight._version - version, None
        try:
            cube.backward()
            new = weight.item()
            outcome = f"gradient {weight.grad.item():.3g}; of the old weight {3 * old**2:.3g}, of the new {3 * new**2:.3g}"
        except RuntimeError:
            outcome = "backward refuses"
        seen[kind, form] = raised > 0, outcome == "backward refuses"
        print(f"torch {torch.__version__}, {kind.__name__}, {form}: counter raised by {raised}, {outcome}")
as_guessed = all(seen[kind, form] == (True, True) for kind, form in seen if form != "fused")
silent = all(seen[kind, form] == (False, False) for kind, form in seen if form == "fused")
raise SystemExit(not (as_guessed and silent))
PYTHON
