"""Stock PEFT LoRA and one more line, `accelerate`: `python examples/accelerate_lora.py`.

The same adapter learns the same real batches twice, by PEFT's own layers and by the fused op. Printed are the last
loss, the time of a step, and what a forward keeps for its backward. What is saved is a stock PEFT adapter.
"""

import argparse
import statistics
import time
from copy import deepcopy

import torch
from peft import LoraConfig, get_peft_model

import alora_kernels
from alora_kernels import data


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict) -> tuple[float, float, float]:
    """One training step: its loss, seconds, and MiB that the forward kept for the backward besides the weights."""
    start, kept = time.perf_counter(), {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item(), time.perf_counter() - start, sum(kept.values()) / 2**20


def main(model: str = "smollm2-135m", steps: int = 8, batch_size: int = 8, output: str = "runs/lora") -> dict:
    """Train both in turn; return loss, seconds and MiB of each."""
    base, tokenizer = data.load_model(model)
    stock = get_peft_model(base, LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear")).train()
    fused = deepcopy(stock)
    print(alora_kernels.accelerate(fused))  # the one line; alora_kernels.restore(fused) takes it back
    models = {"PEFT": stock, "accelerated": fused}
    optimizers = {n: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3) for n, m in models.items()}
    rows = list(data.load_task("trec", train_size=steps * batch_size, test_size=0)["train"])
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for start in range(0, len(rows), batch_size):
        text = [f"{row['prompt']} {row['answer']}" for row in rows[start : start + batch_size]]
        for name in models:
            seen[name].append(step(models[name], optimizers[name], tokenizer(text, return_tensors="pt", padding=True)))
    result = {n: (s[-1][0], statistics.median(t for _, t, _ in s), max(m for *_, m in s)) for n, s in seen.items()}
    for name, (loss, seconds, kept) in result.items():
        print(f"{name}: last loss {loss:.3f}, {seconds:.2f} s a step, {kept:.0f} MiB kept for the backward")
    fused.save_pretrained(output)  # stock PEFT loads it, without this package
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    main(**vars(parser.parse_args()))
