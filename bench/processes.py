"""`python -m bench processes`: how far a training on several processes is from one process's, under DDP and FSDP2.

Each way trains a small llama for a few steps of AdamW over the same rows, on 1, 2 and 4 processes of this machine under
gloo. `docs/processes.md` has the newest run as a table, in the block `bench-processes`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from accelerate.state import AcceleratorState, GradientState, PartialState

from .report.readme import markdown
from .report.rows import ROOT, origin
from .run import conclude

PAGE, BLOCK = ROOT / "docs" / "processes.md", "bench-processes"
WORLDS, ROWS, STEPS = (1, 2, 4), 24, 6
BOUND = 1e-5  # of what a training moves; with a bfloat16 base twice that base's own rounding
TASKS = ["copy", "next", "zero"]
ACCUMULATED, CHECKPOINTED = {"gradient_accumulation_steps": 3}, {"gradient_checkpointing": True}
FSDP: dict[str, Any] = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
KEPT: dict[str, Any] = {"fsdp": True, "fsdp_config": {**FSDP["fsdp_config"], "reshard_after_forward": False}}
WAYS: dict[str, dict[str, Any]] = {
    "DDP": {},
    "DDP, 3 batches a step": ACCUMULATED,
    "DDP, activations checkpointed": CHECKPOINTED,
    "DDP, bfloat16 base": {"dtype": torch.bfloat16},
    "FSDP2": FSDP,
    "FSDP2, 3 batches a step": FSDP | ACCUMULATED,
    "FSDP2, activations checkpointed": FSDP | CHECKPOINTED,
    "FSDP2, whole layers kept (reshard_after_forward: false)": KEPT,
    "FSDP2, bfloat16 base": FSDP | {"dtype": torch.bfloat16},
}


def rows() -> list[dict[str, Any]]:
    """Three tasks on random tokens: repeat the token, name the next, say 1; every token is asked for."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(2 * ROWS):
        ids = torch.randint(3, 30, (int(torch.randint(4, 9, (), generator=generator)),), generator=generator).tolist()
        answers = ([-100, *ids[:-1]], [-100, *(token + 1 for token in ids[:-1])], [-100] + [1] * (len(ids) - 1))
        found.append({"input_ids": ids, "labels": answers[i % 3], "task": TASKS[i % 3]})
    return found


def trained(folder: Path, world: int, *, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, torch.Tensor]:
    """What trains, after the steps, whole in every process; and what it was, with `0 ` before its name."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from alora_kernels import ALoRAConfig
    from alora_kernels.training import ALoRATrainer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 64}
    base: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3))
    base.to(dtype)
    model = get_peft_model(base, ALoRAConfig(r=4, tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in weights.items():  # B at 0 would give A no gradient
        p.data.normal_(std=0.1) if "asymlora_B" in name else None
    before = {f"0 {name}": p.detach().clone() for name, p in weights.items()}
    settings: dict[str, Any] = {
        "per_device_train_batch_size": ROWS // world // options.get("gradient_accumulation_steps", 1),
        "max_steps": STEPS, "learning_rate": 1e-2, "adam_epsilon": 1e-3, "weight_decay": 0.1, "save_strategy": "no",
        "train_sampling_strategy": "sequential", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **settings, **options)
    ALoRATrainer(model=model, args=args, train_dataset=Dataset.from_list(rows()), padding_free=False).train()
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return before | {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach() for name, p in after.items()}


def run(folder: Path, world: int, ways: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
    """`trained` for each way on so many new processes; a RuntimeError with what they said if one fails."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    command = [sys.executable, *start, "-m", "bench.processes", str(folder), *ways]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{world} processes: {done.stdout}{done.stderr}")
    return {way: torch.load(folder / f"{way}.{world}.pt") for way in ways}


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two trainings, of the largest that an entry of its tensor was moved."""
    names = [name for name in one if not name.startswith("0 ")]
    return max(float((one[n] - other[n]).abs().max() / (one[n] - one[f"0 {n}"]).abs().max()) for n in names)


def main(
    way: Annotated[list[str] | None, typer.Option(help="repeatable; default: all")] = None,
    page: Annotated[Path, typer.Option(help=f"its block {BLOCK} is rewritten")] = PAGE,
) -> None:
    """Trainings on 2 and 4 processes against one, DDP and FSDP2 (some minutes)."""
    if unknown := [name for name in way or () if name not in WAYS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(WAYS)}", param_hint="--way")
    table, fine, chosen = [], True, way or list(WAYS)
    with TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        one = run(folder, 1, ["DDP", "DDP, bfloat16 base"])
        many = [run(folder, world, chosen) for world in WORLDS[1:]]
    exact, rounding = one["DDP"], apart(*one.values())
    for title in chosen:  # a bfloat16 base rounds by the shape of a batch, so truth is the float32 training for it too
        bound = 2 * rounding if "dtype" in WAYS[title] else BOUND
        found = [apart(exact, results[title]) for results in many]
        table.append([title, *(f"{value:.1e}" for value in found), f"{bound:.1e}"])
        fine &= max(found) <= bound
    facts = origin("cpu", "transformers", "peft", "accelerate")
    versions = ", ".join(f"{library} {facts[library]}" for library in ("torch", "transformers", "peft", "accelerate"))
    about = f"gloo on {facts['device']}; {versions}; commit {facts['commit']}, {facts['date']}."
    own = f"One process with a bfloat16 base is {rounding:.1e} from float32; twice that is allowed to many."
    columns = [*(f"{world} processes" for world in WORLDS[1:]), "allowed"]
    text = "\n\n".join([about, "\n".join(markdown(["way"], columns, table)), own])
    conclude(page, BLOCK, text, right=fine, whole=not way)


def work(folder: Path, ways: Sequence[str]) -> None:
    """One of the processes: train each way; the first saves what it found."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for way in ways:
        for state in (AcceleratorState, GradientState, PartialState):  # accelerate's, for a whole process
            state._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)
        result = trained(folder, world, **WAYS[way])
        if os.environ.get("RANK", "0") == "0":
            torch.save(result, folder / f"{way}.{world}.pt")


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2:])
