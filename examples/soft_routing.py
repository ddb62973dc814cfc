"""Soft routing, the paper's learned router: no task ids, and a look at what the router chose.

`python examples/soft_routing.py` (about 3 minutes; `--model tiny-random --steps 2` for a glance)
"""

import argparse

import torch
from peft import get_peft_model
from transformers import TrainingArguments

from alora_kernels import data, reference
from alora_kernels.training import ALoRATrainer, TaskCollator
from alora_kernels.tuner import ALoRAConfig, ALoRALayer

TASKS = ["trec", "spam"]


def main(model: str = "smollm2-135m", steps: int = 30, batch_size: int = 16) -> torch.Tensor:
    """Train three experts under a router; return the mean gate of one layer, [tasks, experts]."""
    base, tokenizer = data.load_model(model)
    config = ALoRAConfig(r=8, routing="soft", num_experts=3, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    text = data.load_tasks(TASKS, train_size=500, test_size=20)
    train, test = (data.encode(text[split], tokenizer, max_length=80) for split in ("train", "test"))
    args = TrainingArguments(
        output_dir="runs/soft", max_steps=steps, per_device_train_batch_size=batch_size, learning_rate=1e-3,
        logging_steps=5, save_strategy="no", report_to="none",
    )  # fmt: skip
    ALoRATrainer(model=peft_model, args=args, train_dataset=train, processing_class=tokenizer).train()

    layer = [m for m in peft_model.modules() if isinstance(m, ALoRALayer)][-1]
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    batch = TaskCollator(tokenizer.pad_token_id, TASKS)(list(test))
    with torch.no_grad():
        peft_model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        gate = reference.gate(seen[0], 3, layer.asymlora_router["default"].weight, None)
    hook.remove()
    gates = torch.stack([gate[batch["task_ids"] == i][:, -1].mean(0) for i in range(len(TASKS))])
    for name, row in zip(TASKS, gates.tolist(), strict=True):
        print(f"{name}: mean gate at the last token", " ".join(f"{value:.2f}" for value in row))
    return gates


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=16)
    main(**vars(parser.parse_args()))
