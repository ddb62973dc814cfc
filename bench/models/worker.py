"""A training step through the trainer of whatever `alora_kernels` an interpreter finds: `python -P worker.py JOB`.

`build.Worker` starts it, in this checkout or in a venv with another commit; so it uses public names alone, those that
all commits have. It answers each line of its standard input with a line of JSON and sleeps between two. The job is a
file of torch's with the model, the adapter and its numbers, rows, threads. The end of the input ends it.
"""

from __future__ import annotations

import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def trainer_step(model: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any, folder: Path) -> Callable[[], Tensor]:
    """Forward and backward of a batch as the trainer does it, gradients in `.grad`; no optimiser. Gives the loss."""
    from datasets import Dataset
    from transformers import TrainingArguments

    import alora_kernels

    args = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True)
    data = Dataset.from_list([dict(row) for row in rows])
    trainer: Any = alora_kernels.ALoRATrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
    batch = trainer.data_collator(list(data))

    def step() -> Tensor:
        model.train()
        model.zero_grad()
        loss: Tensor = trainer.compute_loss(model, dict(batch))
        loss.backward()
        return loss.detach()

    return step


def adapter_numbers(model: Any) -> dict[str, Any]:
    """The adapter's parameters by a name that does not depend on the commit."""
    found = ((name.removesuffix(".weight"), p) for name, p in model.named_parameters())
    return {name: p for name, p in found if "asymlora_" in name}


def llama(device: str = "cpu", dtype: torch.dtype = torch.float32, **shape: Any) -> Any:
    """A Llama with random weights, always the same; `shape` is that of `transformers.LlamaConfig`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**shape), dtype=dtype)


def load(job: Mapping[str, Any]) -> tuple[Any, Any]:
    from peft import get_peft_model

    from alora_kernels import ALoRAConfig
    from alora_kernels.data import load_model

    base, tokenizer = (llama(**job["shape"]), None) if job.get("shape") else load_model(job["model"])
    model: Any = get_peft_model(base, ALoRAConfig(**job["adapter"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(adapter_numbers(model).items()):
            parameter.copy_(job["numbers"][name] if job["numbers"] else torch.randn_like(parameter) / 50)
    return model, tokenizer


def peak_mb() -> float:
    """Most memory this process ever held; `ru_maxrss` would begin with what its parent held when it was started."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 / 1e6 if found else float("nan")


def main(file: Path) -> None:
    """Serve one job: "step" makes a step, any other line is the path to which loss and gradients are written."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    warnings.simplefilter("ignore")
    job = torch.load(file)
    torch.set_num_threads(job["threads"])
    model, tokenizer = load(job)
    step, loss = trainer_step(model, job["rows"], tokenizer, file.parent / "trainer"), torch.zeros(())
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() == "step":
            loss = step()
        else:
            torch.save({"loss": loss} | {n: p.grad for n, p in adapter_numbers(model).items()}, line.strip())
        answer = {"seconds": time.perf_counter() - start, "peak_mb": peak_mb()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
