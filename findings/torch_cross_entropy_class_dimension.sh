#!/usr/bin/env bash
# torch on a CPU: the cross entropy of the same float32 logits with the classes last, [N, C], and in the middle, [B, C, L].
# Guess: one formula, so both have the same error; a layout costs at most time.
# Seen: with 49,152 classes in the middle the loss is off 60 times as far from float64's as with the classes last, and the
# gradient 36 times (2e-5 of its largest entry), contiguous or not. A loss per token that is written as
# cross_entropy(logits.movedim(-1, 1), labels) loses more than a digit to cross_entropy(logits.flatten(0, -2),
# labels.flatten()). Our reading: the softmax along a dimension that is not the last one adds up in another way.
# Guard: losses by row are taken with the classes last
# (tests/training/test_batch_loss.py::test_row_losses_are_as_exact_as_torchs_with_the_classes_last).
# Exits with 0 if that is still so, with 1 if the behaviour has changed. Needs Python 3.11 or newer and the network.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work" && "$work/venv/bin/python" - <<'PYTHON'
import torch
import torch.nn.functional as F

torch.manual_seed(0)
logits, labels = 3 * torch.randn(24, 3, 49152), torch.randint(0, 49152, (24, 3))


def last(x):
    return F.cross_entropy(x.flatten(0, -2), labels.flatten(), reduction="sum")


def middle(x):
    return F.cross_entropy(x.movedim(-1, 1), labels, reduction="sum")


def in_one_piece(x):
    return F.cross_entropy(x.movedim(-1, 1).contiguous(), labels, reduction="sum")


def step(loss, x):
    x = x.clone().requires_grad_()
    value = loss(x)
    value.backward()
    return value.detach().double(), x.grad.double()


true_loss, true_gradient = step(last, logits.double())
errors = {}
for way in (last, middle, in_one_piece):
    loss, gradient = step(way, logits)
    off = float((loss - true_loss).abs() / true_loss)
    errors[way] = float((gradient - true_gradient).abs().max() / true_gradient.abs().max())
    print(f"torch {torch.__version__}, classes {way.__name__}: loss off by {off:.1e}, gradient by {errors[way]:.1e}")
raise SystemExit(not (errors[middle] > 10 * errors[last] and errors[in_one_piece] > 10 * errors[last]))
PYTHON
