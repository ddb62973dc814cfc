"""docs/models.md, "Which models work", from what the checks measure: `python -m tests.models --write-docs`."""

from __future__ import annotations

import re
from pathlib import Path

from .cases import CASES, Case
from .checks import checks_of, excluded, measured, merging
from .judge import adapted

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TOLERANCE = 1e-5  # parts of many models compute in float32 whatever their dtype; a wrong task gives 0.1 and more
HEAD = """# Which models work

Every line is a tiny model with random weights, made from its config, adapted with three tasks, and judged by
`tests/models/`. **Works** means that all of the following hold, to {tolerance:g} of the largest entry (they run in
float64; what they give away is their own float32 parts):

- **Mixed batch.** A padded batch of rows with different tasks, one of them `__base__`, gives each row what it gets
  alone: a batch of one, unpadded, with its task. Also for batches with as many tokens as rows, where a layer cannot
  tell the two apart by their number.
- **Training.** Loss and every gradient of `ALoRATrainer` on the mixed batch equal those of the rows alone, weighed by
  their labels; and they equal the model's own loss on the same batch, the load balancing of its experts included.
- **Stock LoRA.** One task for all rows equals PEFT's `LoraConfig` with that task's A and the shared B.
- **Save and load.** Every trained parameter comes back, and the outputs with them.
- **Merge.** One task merged into the base equals the adapter; where a merge is refused the line says why.
- **Generate.** For models that generate: greedy search, beams and several texts per row equal each prompt alone.

`all-linear` is what `target_modules` says unless a line names others. *Left out* are modules that stock LoRA adapts
under the same `target_modules` and ALoRA does not: they see something else than the rows of the batch, return several
tensors, or are parameters instead of layers, as fused experts are without `target_parameters`
([mixtures of experts](experts.md)). A warning names them.

| model | outcome | left out, or the reason |
|---|---|---|
"""
FOOT = """
## Your own model

The same comparison in a few lines, in float32 to about 1e-5:

<!-- sketch: of your model -->
```python
model = get_peft_model(base, ALoRAConfig(tasks=["a", "b"], target_modules="all-linear", init_weights=False)).eval()
mixed = model(**tokenizer([long, short], padding=True, return_tensors="pt"), adapter_names=["a", "b"])
alone = model(**tokenizer([short], return_tensors="pt"), adapter_names=["b"])  # compare at the row's real positions
```

`init_weights=False` makes B random: with the usual zeros every task would agree. This page is written by
`python -m tests.models --write-docs`; a test compares it with what the checks give.
"""


def page() -> str:
    """The whole page."""
    lines: list[str] = []
    family = ""
    for case in CASES:
        if case.family != family:
            lines.append(f"| **{case.family}** | | |")
            family = case.family
        lines.append(line(case))
    return HEAD.format(tolerance=TOLERANCE) + "\n".join(lines) + "\n" + FOOT


def line(case: Case) -> str:
    """The line of one model."""
    name = f"`{case.model}`" + (f", {case.variant}" if case.variant else "")
    named = isinstance(case.targets, tuple) and not case.parameters
    chosen = [f"`target_modules={list(case.targets or ())}`"] if named else []
    if case.parameters:
        chosen.append(f'`target_parameters="{case.parameters}"`')
    if case.exclude_modules:
        chosen.append(f"`exclude_modules={list(case.exclude_modules)}`")
    return f"| {'; '.join([name, *chosen])} | {' | '.join(outcome(case))} |"


def outcome(case: Case) -> tuple[str, str]:
    """Works or refused, and what there is to say."""
    try:
        adapted(case)
    except (TypeError, ValueError) as error:
        return "refused", _cell(error)
    errors = {check: measured(case, check) for check in checks_of(case)}
    wrong = [f"{check} {error:.0e}" for check, error in errors.items() if error > TOLERANCE]
    if wrong:
        return "WRONG", ", ".join(wrong)
    notes = [", ".join(f"`{name}`" for name in excluded(case))] if excluded(case) else []
    if "merge" not in errors:
        notes.append(f"merge refused: {_merge_refusal(case)}")
    return "works", "; ".join(notes)


def _merge_refusal(case: Case) -> str:
    try:
        merging(case)
    except ValueError as error:
        return _cell(error)
    return ""


def _cell(error: Exception) -> str:
    """A message as one cell: its first sentence, or the first line of its list."""
    text = re.sub(r"\s+", " ", str(error).partition("\n- ")[2] or str(error)).replace("|", "\\|").replace("<", "&lt;")
    return re.split(r"(?<=[.:;]) ", text, maxsplit=1)[0].rstrip(":;")
