"""`python -m bench verify-lm-eval`: the real lm-evaluation-harness against the model called by hand, in float32.

Random adapters on SmolLM2 as in `bench serving`. A task of two answers, one of a whole text and one of a generation are
written to a temporary folder as local YAML, as a user would, and run by `alora lm-eval` and by `ALoRALM`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer

from .report.readme import markdown
from .report.rows import origin
from .run import checked, conclude
from .serving.adapters import Adapters
from .verify_vllm import PAGE

BLOCK = "verify-lm-eval"
CLOSE = 1e-4  # nats of a whole answer: two float32 programs that pad differently
NEW = 6  # tokens of a generation
COMMON = {"dataset_path": "json", "test_split": "train", "doc_to_text": "{{question}}", "metadata": {"version": 1}}
TASKS: dict[str, dict[str, Any]] = {
    "two_answers": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label"},
    "whole_text": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
                   "metric_list": [{"metric": "bits_per_byte"}]},
    "generation": {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
                   "generation_kwargs": {"until": ["\n\n\n"], "max_gen_toks": NEW, "do_sample": False},
                   "metric_list": [{"metric": "exact_match"}]},
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """One of our tasks, or the base."""

    name: str
    accuracy: float  # of the harness, and of ours by hand
    ours: float
    answers: int
    apart: float  # the largest distance of two log-likelihoods, nats
    generated: int
    equal: int

    @property
    def right(self) -> bool:
        """Whether the harness found what the model says by hand."""
        return self.accuracy == self.ours and self.apart < CLOSE and self.equal == self.generated


class ByHand:
    """The model under `route`, one row at a time, no padding."""

    def __init__(self, model: Any, tokenizer: Any, task: int) -> None:
        self.model, self.tokenizer, self.task = model, tokenizer, task

    @torch.no_grad()
    def log_p(self, ids: Sequence[int], answer: int) -> float:
        """Of the last `answer` tokens after those before."""
        from alora_kernels import route

        with route([self.task]):
            logits = self.model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        return float(logits.gather(1, torch.tensor(ids[1:])[:, None])[-answer:].double().sum())

    def choices(self, question: str, choices: Sequence[str]) -> list[float]:
        start = self.tokenizer(question)["input_ids"]
        whole = [self.tokenizer(f"{question} {choice}")["input_ids"] for choice in choices]
        return [self.log_p(ids, len(ids) - len(start)) for ids in whole]

    def text(self, text: str) -> float:
        start = self.tokenizer.bos_token_id
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.log_p([self.tokenizer.eos_token_id if start is None else start, *ids], len(ids))

    @torch.no_grad()
    def generated(self, question: str) -> str:
        from alora_kernels import route

        ids = self.tokenizer(question, return_tensors="pt")
        with route([self.task]):
            out = self.model.generate(**ids, max_new_tokens=NEW, do_sample=False)
        return str(self.tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def write_tasks(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The three tasks, over one file of rows."""
    import yaml

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        settings = COMMON | {"task": name, "dataset_kwargs": {"data_files": str(data)}} | task
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def judged(name: str, hand: ByHand, samples: dict[str, Any], accuracy: float, rows: Sequence[Any]) -> Verdict:
    """The harness's samples of one task against the model by hand."""
    of = {task: sorted(found, key=lambda sample: sample["doc_id"]) for task, found in samples.items()}
    apart, hits, equal = 0.0, 0, 0
    for row, two, text, answer in zip(rows, of["two_answers"], of["whole_text"], of["generation"], strict=True):
        own = hand.choices(row["question"], row["choices"])
        hits += own.index(max(own)) == row["label"]
        theirs = [float(found[0]) for found in two["filtered_resps"]]
        whole = float(text["resps"][0][0])
        pairs = [*zip(own, theirs, strict=True), (hand.text(row["question"]), whole)]
        apart = max(apart, *(abs(a - b) for a, b in pairs))
        equal += hand.generated(row["question"]) == answer["resps"][0][0]
    return Verdict(name, accuracy, hits / len(rows), 3 * len(rows), apart, len(rows), equal)


def verify(model: str, tasks: int, count: int) -> list[Verdict]:
    """Adapters, tasks, `alora lm-eval`, `ALoRALM`, and by hand."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from peft import PeftModel

    from alora_kernels import data
    from alora_kernels.integrations.lm_eval import ALoRALM

    base, tokenizer = data.load_model(model, dtype=torch.float32)
    adapters = Adapters(base, tasks)
    names = [adapters.name(task) for task in range(tasks)]
    drawn = data.load_tasks(["movie"], train_size=0, test_size=count)["test"]
    words = list(data.labels_of("movie"))
    rows = [{"question": r["prompt"], "choices": words, "label": words.index(r["answer"])} for r in drawn]
    with TemporaryDirectory(prefix="verify-lm-eval-") as name:
        folder = Path(name)
        write_tasks(folder, rows)
        saved, out = adapters.write(folder / "adapter", tasks), folder / "out.json"
        asked = ["--tasks", ",".join(TASKS), "--include-path", name, "--model", model, "--dtype", "float32"]
        command = [sys.executable, "-m", "alora_kernels", "lm-eval", str(saved), *asked, "--out", str(out)]
        subprocess.run(command, check=True)
        found = json.loads(out.read_text())["results"]
        adapted = PeftModel.from_pretrained(base, str(saved)).eval()
        manager, verdicts = TaskManager(include_path=name), []
        for label, task in (("base", "__base__"), *zip(names, names, strict=True)):
            lm = ALoRALM(adapted, task=task, tokenizer=tokenizer, batch_size=8)
            samples = simple_evaluate(lm, tasks=list(TASKS), task_manager=manager)["samples"]
            hand = ByHand(adapted, tokenizer, -1 if label == "base" else names.index(task))
            verdicts.append(judged(label, hand, samples, found[label]["two_answers"]["acc,none"], rows))
    return verdicts


def block(verdicts: Sequence[Verdict], facts: str) -> str:
    """The result in Markdown."""
    columns = ["accuracy", "by hand", "log-likelihoods", "furthest apart", "generations", "equal"]
    rows = [
        [v.name, "right" if v.right else "**wrong**", f"{v.accuracy:.3f}", f"{v.ours:.3f}", str(v.answers),
         f"{v.apart:.1e}", str(v.generated), str(v.equal)]
        for v in verdicts
    ]  # fmt: skip
    return f"{facts}\n\n" + "\n".join(markdown(["task", "verdict"], columns, rows))


def main(
    model: Annotated[str, typer.Option(help="the base")] = "smollm2-135m",
    tasks: Annotated[int, typer.Option(min=1)] = 3,
    rows: Annotated[int, typer.Option(help="of each harness task", min=1)] = 24,
    page: Annotated[Path, typer.Option(help=f"its block {BLOCK} is rewritten")] = PAGE,
) -> None:
    """Log-likelihoods and generations of the harness against the model called by hand (about three minutes)."""
    from alora_kernels.recipes.display import quiet

    quiet()
    verdicts = checked(None, verify, model, tasks, rows)
    run = origin("cpu", "transformers", "peft")
    versions = f"lm-eval {version('lm_eval')}, torch {run['torch']}, transformers {run['transformers']}"
    text = block(verdicts, f"{model}, float32; {versions}, peft {run['peft']}; commit {run['commit']}, {run['date']}.")
    conclude(page, BLOCK, text, right=all(v.right for v in verdicts))
