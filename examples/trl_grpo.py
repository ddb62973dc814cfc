"""TRL's GRPOTrainer, one task is paid for long answers, one for short: `python examples/trl_grpo.py` (minutes)."""

import argparse

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from alora_kernels import data
from alora_kernels.integrations.trl import with_tasks
from alora_kernels.tuner import ALoRAConfig

TASKS = ["long", "short"]
ROWS = [{"prompt": f"Tell me about {what}.", "task": task} for what in ("rivers", "bread", "snow") for task in TASKS]


def length(completions: list[str], task: list[str], **_: object) -> list[float]:
    """TRL hands over every column of the dataset."""
    return [float(len(text) if t == "long" else -len(text)) for text, t in zip(completions, task, strict=True)]


def main(model: str = "smollm2-135m", steps: int = 20, output: str = "runs/trl_grpo") -> list[dict]:
    """Train one adapter for both tasks, a generated batch at a time, and save it."""
    base, tokenizer = data.load_model(model)
    trainer = with_tasks(GRPOTrainer)(
        model=base,
        args=GRPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            num_generations=4,
            max_completion_length=16,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        reward_funcs=length,
        peft_config=ALoRAConfig(r=8, lora_alpha=16, tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(output)
    return trainer.state.log_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="runs/trl_grpo")
    main(**vars(parser.parse_args()))
