"""Replace `nn.Linear` in a plain torch model and train two tasks at once: `python examples/drop_in.py`.

Two tasks ask opposite questions about the same points: is x0 > x1, is x0 < x1? Nothing in the input tells them
apart, only the task id does.
"""

import argparse

import torch
from torch import nn

import alora_kernels
from alora_kernels import FusedALoRALinear

TASKS = ["larger", "smaller"]


def make_batch(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points, task ids and answers."""
    x, task_ids = torch.randn(rows, 2), torch.randint(0, 2, (rows,))
    larger = (x[:, 0] > x[:, 1]).long()
    return x, task_ids, torch.where(task_ids == 0, larger, 1 - larger)


def main(steps: int = 200) -> dict[str, float]:
    """Train, and return the accuracy of each task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2)).requires_grad_(False)
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            setattr(model, name, FusedALoRALinear.from_linear(layer, r=4, tasks=TASKS))

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        x, task_ids, answers = make_batch(64)
        with alora_kernels.route(task_ids):  # every layer inside reads the ids of this batch
            loss = nn.functional.cross_entropy(model(x), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x, task_ids, answers = make_batch(1000)
    with torch.no_grad(), alora_kernels.route(task_ids):
        right = model(x).argmax(-1) == answers
    accuracy = {name: right[task_ids == i].float().mean().item() for i, name in enumerate(TASKS)}
    print(f"after {steps} steps:", {name: f"{value:.3f}" for name, value in accuracy.items()})
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    main(**vars(parser.parse_args()))
