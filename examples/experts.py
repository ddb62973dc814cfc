"""Two tasks on the experts of a mixture, each exported as a stock LoRA: `python examples/experts.py`."""

import argparse

import torch
from peft import get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from alora_kernels import ALoRAConfig, export_lora


def main(steps: int = 100, output: str = "runs/experts") -> list[float]:
    """Train on two tasks that answer each token of the same texts with the next one and the one before; the losses."""
    torch.manual_seed(0)
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    ))  # fmt: skip
    config = ALoRAConfig(r=8, tasks=["next", "before"], target_parameters="all-experts", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)  # target_modules="all-linear" beside it adapts attention too
    model.print_trainable_parameters()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(steps):
        texts = torch.randint(4, 63, (16, 12))
        labels = texts.roll(1, 1) + torch.tensor([1] * 8 + [-1] * 8)[:, None]
        labels[:, 0] = -100  # a model is asked for the token after the one it sees
        loss = model(input_ids=texts, labels=labels, adapter_names=["next"] * 8 + ["before"] * 8).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.save_pretrained(output)
    report = export_lora(model, f"{output}/stock", overwrite=True)  # target_parameters of stock PEFT
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f};", ", ".join(str(task.folder) for task in report.tasks))
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", default="runs/experts")
    main(**vars(parser.parse_args()))
