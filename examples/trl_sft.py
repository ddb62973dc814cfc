"""TRL's SFTTrainer, texts of two tasks packed into one row: `python examples/trl_sft.py` (about a minute)."""

import argparse

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from alora_kernels import data
from alora_kernels.integrations.trl import with_tasks
from alora_kernels.tuner import ALoRAConfig

TASKS = ["opposite", "comparative"]
WORDS = {
    "hot": ("cold", "hotter"), "big": ("small", "bigger"), "old": ("young", "older"), "fast": ("slow", "faster"),
    "high": ("low", "higher"), "rich": ("poor", "richer"), "dark": ("light", "darker"), "strong": ("weak", "stronger"),
}  # fmt: skip
ROWS = [
    {"prompt": f"{word}:", "completion": f" {answer}", "task": task}
    for word, answers in WORDS.items()
    for task, answer in zip(TASKS, answers)
]


def main(model: str = "smollm2-135m", steps: int = 30, output: str = "runs/trl_sft") -> list[dict]:
    """Train one adapter for both tasks and save it."""
    base, tokenizer = data.load_model(model)
    trainer = with_tasks(SFTTrainer)(
        model=base,
        args=SFTConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=1,
            learning_rate=1e-3,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            packing=True,
            max_length=128,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=ALoRAConfig(r=8, lora_alpha=16, tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(output)
    inputs = tokenizer(["cheap:", "cheap:"], return_tensors="pt").to(trainer.model.device)
    out = trainer.model.eval().generate(**inputs, adapter_names=TASKS, max_new_tokens=4, do_sample=False)
    print(tokenizer.batch_decode(out, skip_special_tokens=True))
    return trainer.state.log_history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="runs/trl_sft")
    main(**vars(parser.parse_args()))
