"""PEFT and the trainer on real tasks, mixed in every batch: `python examples/multitask_peft.py` (about 3 minutes)."""

import argparse

from peft import get_peft_model
from transformers import TrainingArguments

from alora_kernels import data
from alora_kernels.training import ALoRATrainer
from alora_kernels.tuner import ALoRAConfig

TASKS = ["trec", "movie", "spam", "bbc"]


def main(model: str = "smollm2-135m", steps: int = 40, batch_size: int = 32, output: str = "runs/multitask") -> dict:
    """Train one adapter on all tasks, evaluate each, save it."""
    base, tokenizer = data.load_model(model)
    config = ALoRAConfig(r=8, lora_alpha=16, tasks=TASKS, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    peft_model.print_trainable_parameters()

    text = data.load_tasks(TASKS, train_size=1500, test_size=50)
    trainer = ALoRATrainer(
        model=peft_model,
        args=TrainingArguments(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-3,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data.encode(text["train"], tokenizer, max_length=80),
        eval_dataset=data.encode(text["test"], tokenizer, max_length=80),
        processing_class=tokenizer,
        task_temperature=1e6,  # all tasks equally often
    )
    trainer.train()
    metrics = trainer.evaluate()
    peft_model.save_pretrained(output)

    prompts = ["Question: Who wrote Hamlet?\nType:", "Message: You won a prize, call now!\nSpam or ham:"]
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(peft_model.device)
    out = peft_model.generate(**inputs, adapter_names=["trec", "spam"], max_new_tokens=4, do_sample=False)
    print(tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", default="runs/multitask")
    main(**vars(parser.parse_args()))
