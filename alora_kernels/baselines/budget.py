"""What each method trains, counted before anything is built: methods by name, parameters, and ranks of equal cost.

In:   a method, a rank, the shapes of the adapted layers, the numbers of tasks and experts.
Out:  numbers of trainable parameters; the rank with which a method trains about as many as ALoRA.
Who:  recipes and `baselines.methods`. Pure arithmetic, no model and nothing heavy to import.

Every count is affine in the rank, so the nearest rank is a division. Numbers leave out what all methods train alike,
such as a classifier's head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count as count_from

#: method -> how tables call it
METHODS = {
    "alora": "ALoRA",
    "alora-soft": "ALoRA, soft",
    "lora": "LoRA",
    "lora-per-task": "LoRA per task",
    "hydralora": "HydraLoRA",
}
ROUTED = ("alora", "lora-per-task")  # the ids of a batch matter to these
EXPERTS = ("alora-soft", "hydralora")  # and these have num_experts under a learned router

Shapes = Sequence[tuple[int, int]]


def check_method(method: object) -> None:
    """Raise unless this is a method's name.

    Raises:
        ValueError: listing those there are.
    """
    if method not in list(METHODS):  # a list: what YAML or JSON gives may have no hash
        raise ValueError(f"method: must be one of {', '.join(METHODS)}, got {method!r}")


def parameters_of(method: str, r: int, shapes: Iterable[tuple[int, int]], *, tasks: int, num_experts: int) -> int:
    """How many parameters a method's adapters have.

    Formula, per layer of K inputs and N outputs, with T tasks and E experts:
        alora `T r K + N r`; alora-soft `E r K + N r + E K`; lora `r K + N r`; lora-per-task `T (r K + N r)`;
        hydralora `r K + E N r + E K`.

    Args:
        method: a key of `METHODS`.
        r: rank.
        shapes: (K, N) of each adapted layer.
        tasks: T.
        num_experts: E.

    Raises:
        ValueError: an unknown method.
    """
    check_method(method)
    copies_of_a = {"alora": tasks, "lora-per-task": tasks, "alora-soft": num_experts}.get(method, 1)
    copies_of_b = {"lora-per-task": tasks, "hydralora": num_experts}.get(method, 1)
    routers = num_experts if method in EXPERTS else 0
    return sum(r * (copies_of_a * k + copies_of_b * n) + routers * k for k, n in shapes)


def rank_for(method: str, r: int, shapes: Shapes, *, tasks: int, num_experts: int) -> int:
    """The rank with which a method trains as many parameters as task-routed ALoRA of rank r, to the nearest.

    Args:
        method: a key of `METHODS`.
        r: ALoRA's rank.
        shapes: (K, N) of each adapted layer.
        tasks: T.
        num_experts: E.

    Returns:
        A rank >= 1; of two that are equally near the smaller.

    Raises:
        ValueError: no layer, an unknown method, or none but rank 0 is near; the message names the smallest r that will
            do.
    """
    if not shapes:
        raise ValueError("budget: no layer is adapted, so there is nothing to count: check target_modules")
    found = _nearest(method, r, shapes, tasks, num_experts)
    if found >= 1:
        return found
    enough = next(more for more in count_from(r + 1) if _nearest(method, more, shapes, tasks, num_experts) >= 1)
    target = parameters_of("alora", r, shapes, tasks=tasks, num_experts=num_experts)
    least = parameters_of(method, 1, shapes, tasks=tasks, num_experts=num_experts)
    raise ValueError(
        f"budget: {method} needs {least} trainable parameters at rank 1, far more than the {target} of alora with r={r}"
        f" and {tasks} tasks: give r of at least {enough}, or budget: rank"
    )


def _nearest(method: str, r: int, shapes: Shapes, tasks: int, num_experts: int) -> int:
    """The rank >= 0 whose count is nearest to ALoRA's."""

    def size(rank: int) -> int:
        return parameters_of(method, rank, shapes, tasks=tasks, num_experts=num_experts)

    target = parameters_of("alora", r, shapes, tasks=tasks, num_experts=num_experts)
    fixed = size(0)
    below = max(0, (target - fixed) // (size(1) - fixed))
    return min((below, below + 1), key=lambda rank: (abs(size(rank) - target), rank))
