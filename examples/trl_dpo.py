"""TRL's DPOTrainer, where each task prefers what the other rejects: `python examples/trl_dpo.py` (about a minute)."""

import argparse

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from alora_kernels import data
from alora_kernels.integrations.trl import with_tasks
from alora_kernels.tuner import ALoRAConfig

TASKS = ["opposite", "comparative"]
WORDS = {
    "hot": ("cold", "hotter"), "big": ("small", "bigger"), "old": ("young", "older"), "fast": ("slow", "faster"),
    "high": ("low", "higher"), "rich": ("poor", "richer"), "dark": ("light", "darker"), "strong": ("weak", "stronger"),
}  # fmt: skip
ROWS = [
    {"prompt": f"{word}:", "chosen": f" {answers[i]}", "rejected": f" {answers[1 - i]}", "task": task}
    for word, answers in WORDS.items()
    for i, task in enumerate(TASKS)
]


def main(model: str = "smollm2-135m", steps: int = 20, output: str = "runs/trl_dpo") -> list[dict]:
    """Train one adapter for both tasks and save it."""
    base, tokenizer = data.load_model(model)
    trainer = with_tasks(DPOTrainer)(
        model=base,
        args=DPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=ALoRAConfig(r=8, lora_alpha=16, tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(output)
    return trainer.state.log_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/trl_dpo")
    main(**vars(parser.parse_args()))
