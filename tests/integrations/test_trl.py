"""TRL's trainers with a task per row: value and gradient of every loss are those of each row alone with its task."""

from __future__ import annotations

import functools
import random
import re
import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import ClassLabel, Dataset, IterableDataset
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedTokenizerFast

from alora_kernels import train_only
from alora_kernels.training.collator import WithTasks
from alora_kernels.tuner import ALoRAConfig

from ..support import tiny

trl = pytest.importorskip("trl")
from alora_kernels.integrations import trl as integration  # noqa: E402
from alora_kernels.integrations.trl import pack_rows, with_tasks  # noqa: E402

TASKS = ["math", "code"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, tiny.VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def text(seed: int, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(3, tiny.VOCAB)}" for _ in range(words))


def ids_of(words: str) -> list[int]:
    return tokenizer()(words)["input_ids"]


LENGTHS = [(3, 4), (2, 6), (5, 2), (4, 3)]  # of prompts and answers
ORDER = ["math", "math", "code", "math"]  # not the same backwards


def pairs() -> list[dict[str, Any]]:
    return [
        {"prompt": text(i, p), "chosen": " " + text(10 + i, c), "rejected": " " + text(20 + i, 8 - c), "task": task}
        for i, ((p, c), task) in enumerate(zip(LENGTHS, ORDER, strict=True))
    ]


def config(**changes: Any) -> ALoRAConfig:
    return tiny.config(target_modules=["q_proj", "v_proj", "down_proj"], **changes)


def arguments(kind: type, folder: Any, **changes: Any) -> Any:
    options = {"output_dir": str(folder), "per_device_train_batch_size": 4, "bf16": False, "use_cpu": True}
    options |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False}
    options |= {"max_steps": 1, "logging_steps": 1, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    return kind(**(options | changes))


def trainer_of(name: str, folder: Any, rows: Any, model: Any = None, **changes: Any) -> Any:
    """A trainer of `adapted()`, which TRL copies for its reference; the trained adapter then moves away from it."""
    own = {key: changes.pop(key) for key in ("peft_config", "reward_funcs", "eval_dataset") if key in changes}
    args = arguments(getattr(trl, f"{name}Config"), folder, **changes)
    trainer = with_tasks(getattr(trl, f"{name}Trainer"))(
        model=adapted() if model is None else model, args=args, processing_class=tokenizer(),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows, **own,
    )  # fmt: skip
    move(trainer.model, 5)
    return trainer


def adapted(base: Any = None, **changes: Any) -> Any:
    return get_peft_model(tiny.llama(eos_token_id=1) if base is None else base, config(**changes))


def move(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for name, p in model.named_parameters():
        if ".default." in name:
            p.data += 0.1 * torch.randn_like(p)


def score(model: Any, ids: list[int], start: int, task: str) -> torch.Tensor:
    """Log-probability of the tokens from `start` on, of one row alone."""
    logits = model(input_ids=torch.tensor([ids]), adapter_names=[task]).logits[0, start - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None]).sum()


def reference(model: Any, ids: list[int], start: int, task: str) -> torch.Tensor:
    with torch.no_grad():
        if "ref" not in model.peft_config:
            with model.disable_adapter():
                return score(model, ids, start, task)
        model.set_adapter("ref")
        found = score(model, ids, start, task)
        model.set_adapter("default")
        return found


def batch_of(trainer: Any) -> dict[str, Any]:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def with_gradient(model: Any, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.detach(), tiny.adapter_grads(model)


def assert_as_alone(trainer: Any, alone: Any, order: list[str] = ORDER, batch: Any = None) -> None:
    """`alone(model, tasks)` is the loss made of rows alone; with the tasks of two rows swapped it is another."""
    model = trainer.model
    got, grads = with_gradient(model, trainer.compute_loss(model, batch_of(trainer) if batch is None else batch))
    want, wanted = with_gradient(model, alone(model, order))
    torch.testing.assert_close(got, want, **CLOSE)
    assert wanted and grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)
    for one, other in pairwise(range(len(order))):
        if order[one] != order[other]:
            swapped = list(order)
            swapped[one], swapped[other] = order[other], order[one]
            loss, grads = with_gradient(model, alone(model, swapped))
            assert not torch.allclose(loss, want, **CLOSE)
            assert not all(torch.allclose(grads[name], wanted[name], **CLOSE) for name in grads)


@pytest.fixture(autouse=True)
def order_of_the_rows(monkeypatch):
    """Batches in the order of the dataset."""
    monkeypatch.setattr(transformers.Trainer, "_get_train_sampler", lambda self, dataset=None: None)


def sft_rows() -> list[dict[str, Any]]:
    rows = [{"input_ids": ids_of(p["prompt"] + p["chosen"]), "task": p["task"]} for p in pairs()]
    return [
        row | {"labels": [-100] * (1 + i % 2) + row["input_ids"][1 + i % 2 :], "task": row["task"]}
        for i, row in enumerate(rows)
    ]


def sft_alone(model: Any, order: list[str]) -> torch.Tensor:
    total, count = torch.zeros(()), 0
    for i, (row, task) in enumerate(zip(sft_rows(), order, strict=True)):
        total = total - score(model, row["input_ids"], 1 + i % 2, task)
        count += len(row["input_ids"]) - 1 - i % 2
    return total / count


@pytest.mark.parametrize("changes", [
    {}, {"padding_free": True, "max_length": None}, {"gradient_checkpointing": True},
    {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    {"packing": True, "max_length": 16}, {"packing": True, "max_length": 24, "gradient_checkpointing": True},
    {"packing": True, "max_length": 16, "pad_to_multiple_of": 64, "eager": True},
], ids=["padded", "joined", "checkpointed", "filled", "packed", "packed-checkpointed", "packed-filled"])  # fmt: skip
def test_sft(tmp_path, changes):
    base = tiny.llama(eos_token_id=1)
    changes = dict(changes)
    base.set_attn_implementation("eager" if changes.pop("eager", False) else "sdpa")
    trainer = trainer_of("SFT", tmp_path, sft_rows(), adapted(base), **changes)
    if "packing" in changes:
        packs = [row["task"] for row in trainer.train_dataset]
        assert max(map(len, packs)) > 1 and sorted(t for pack in packs for t in pack) == sorted(ORDER)
    assert_as_alone(trainer, sft_alone)
    assert not isinstance(trainer.data_collator, WithTasks)  # TRL looks for its own


def test_sft_by_names_of_the_model_and_a_stream(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(sft_rows()))
    trainer = trainer_of("SFT", tmp_path, stream, tiny.llama(eos_token_id=1), peft_config=config())
    assert_as_alone(trainer, sft_alone)
    packed = trainer_of("SFT", tmp_path, stream, tiny.llama(eos_token_id=1), peft_config=config(), packing=True)
    assert_as_alone(packed, sft_alone)


def test_sft_trains_and_evaluates_sets_by_name_packed_in_bf16(tmp_path):
    """The options that TRL starts with; a set that is given to `evaluate` is packed once."""
    sets = {"all": Dataset.from_list(sft_rows()), "first": Dataset.from_list(sft_rows()[:2])}
    options = {"packing": True, "max_length": 16, "gradient_checkpointing": True}
    trainer = trainer_of("SFT", tmp_path, sft_rows(), eval_dataset=sets, **options)
    for metrics in (trainer.evaluate(), trainer.evaluate(sets)):
        assert metrics["eval_all_loss"] == pytest.approx(float(sft_alone(trainer.model, ORDER)), rel=1e-4)
    trainer = trainer_of("SFT", tmp_path, sft_rows(), **options | {"bf16": True})
    with torch.no_grad():
        wanted = float(sft_alone(trainer.model, ORDER))
    assert trainer.train().training_loss == pytest.approx(wanted, rel=2e-2)


def dpo_alone(model: Any, order: list[str]) -> torch.Tensor:
    total = torch.zeros(())
    for row, task in zip(pairs(), order, strict=True):
        prompt = len(ids_of(row["prompt"]))
        chosen, rejected = ([*ids_of(row["prompt"] + row[key]), 1] for key in ("chosen", "rejected"))
        margin = score(model, chosen, prompt, task) - score(model, rejected, prompt, task)
        margin = margin - (reference(model, chosen, prompt, task) - reference(model, rejected, prompt, task))
        total = total - F.logsigmoid(0.5 * margin)
    return total / len(order)


@pytest.mark.parametrize("precompute", [False, True])
def test_dpo(tmp_path, precompute):
    trainer = trainer_of("DPO", tmp_path, pairs(), beta=0.5, precompute_ref_log_probs=precompute)
    assert "ref" in trainer.model.peft_config
    assert_as_alone(trainer, dpo_alone)


def test_dpo_with_the_base_as_reference(tmp_path):
    base = tiny.llama(eos_token_id=1)
    assert_as_alone(trainer_of("DPO", tmp_path, pairs(), base, beta=0.5, peft_config=config()), dpo_alone)


def test_a_reference_of_another_adapter_is_refused(tmp_path):
    """TRL copies "default" whatever trains: a reference that the policy never was."""
    model = adapted()
    model.add_adapter("other", config())
    model.set_adapter("other")
    with pytest.raises(ValueError, match=r'a copy of the adapter "default", but \[\'other\'\] trains'):
        trainer_of("DPO", tmp_path, pairs(), model, beta=0.5)
    model = adapted()
    model.add_adapter("other", config())
    assert "ref" in trainer_of("DPO", tmp_path, pairs(), model, beta=0.5).model.peft_config  # "default" trains


def test_reward(tmp_path):
    shape = tiny.llama(eos_token_id=1).config
    shape.num_labels = 1
    torch.manual_seed(1)
    base = transformers.LlamaForSequenceClassification(shape)
    base.score.weight.data *= 20
    model = adapted(base, task_type="SEQ_CLS")

    def alone(model: Any, order: list[str]) -> torch.Tensor:
        total = torch.zeros(())
        for row, task in zip(pairs(), order, strict=True):
            chosen, rejected = (
                model(input_ids=torch.tensor([[*ids_of(row["prompt"] + row[key]), 1]]), adapter_names=[task]).logits
                for key in ("chosen", "rejected")
            )
            total = total - F.logsigmoid(chosen - rejected).squeeze()
        return total / len(order)

    trainer = trainer_of("Reward", tmp_path, pairs(), model, eval_dataset=Dataset.from_list(pairs()))
    assert_as_alone(trainer, alone)
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(alone(trainer.model, ORDER)), rel=1e-4)


def kto_alone(model: Any, order: list[str]) -> torch.Tensor:
    """Completions of the row before, within a batch, estimate the KL: their task is that of the prompt."""
    rows, losses, shifted = pairs(), [], torch.zeros(())
    answers = [row["chosen" if i % 2 else "rejected"] for i, row in enumerate(rows)]
    for i, task in enumerate(order):
        prompt = len(ids_of(rows[i]["prompt"]))
        ids = [*ids_of(rows[i]["prompt"] + answers[i - 1]), 1]
        shifted = shifted + score(model, ids, prompt, task).detach() - reference(model, ids, prompt, task)
    kl = (shifted / len(order)).clamp_min(0)
    for i, task in enumerate(order):
        prompt, ids = len(ids_of(rows[i]["prompt"])), [*ids_of(rows[i]["prompt"] + answers[i]), 1]
        ratio = score(model, ids, prompt, task) - reference(model, ids, prompt, task)
        losses.append(1 - torch.sigmoid(0.5 * (ratio - kl if i % 2 else kl - ratio)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("precompute", [False, True])
def test_kto(tmp_path, precompute):
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        | {"task": row["task"]}
        for i, row in enumerate(pairs())
    ]
    trainer = trainer_of("KTO", tmp_path, rows, beta=0.5, precompute_ref_log_probs=precompute)
    move(trainer.model, 7)
    assert_as_alone(trainer, kto_alone)


def reward(completions: list[str], task: list[str], **_: Any) -> list[float]:
    return [float(len(set(c.split()))) + (t == "code") * i for i, (c, t) in enumerate(zip(completions, task))]


PROMPTS = [{"prompt": row["prompt"], "task": row["task"]} for row in pairs()]
GENERATED = {
    "num_generations": 2, "max_completion_length": 5, "steps_per_generation": 2, "per_device_train_batch_size": 4,
    "beta": 0.3, "shuffle_dataset": False, "generation_kwargs": {"min_new_tokens": 2},
}  # fmt: skip
GRPO = {"loss_type": "grpo", "use_bias_correction_kl": False}


def generated(part: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of each row."""
    names = (("prompt_ids", "prompt_mask"), ("completion_ids", "completion_mask"))
    return [tuple(part[ids][i][part[mask][i].bool()].tolist() for ids, mask in names) for i in range(4)]


def check_order(part: dict[str, torch.Tensor]) -> list[str]:
    """Tasks of the rows, which are those of their prompts."""
    texts = {tuple(ids_of(row["prompt"])): row["task"] for row in PROMPTS}
    order = [texts[tuple(prompt)] for prompt, _ in generated(part)]
    assert order == [TASKS[i] for i in part["task_ids"].tolist()]
    return order


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_grpo_and_rloo(tmp_path, name):
    """Four prompts, two answers each, generated at once, scored in two parts, shuffled, trained on in two."""
    trainer = trainer_of(name, tmp_path, PROMPTS, reward_funcs=reward, **GENERATED, **(GRPO if name == "GRPO" else {}))
    trainer.current_gradient_accumulation_steps, model = 1, trainer.model.train()
    batch_of(trainer)
    parts = trainer._buffered_inputs
    assert len(parts) == 2
    orders = [check_order(part) for part in parts]
    for part, order in zip(parts, orders, strict=True):  # what was scored in parts of the batch
        for i, ((prompt, answer), task) in enumerate(zip(generated(part), order, strict=True)):
            asked = prompt + answer, len(prompt), task
            old = part["old_logps"][i] if name == "RLOO" else part["old_per_token_logps"][i][: len(answer)].sum()
            torch.testing.assert_close(old, score(model, *asked).detach(), **CLOSE)
            if name == "GRPO":
                found = part["ref_per_token_logps"][i][: len(answer)].sum()
                torch.testing.assert_close(found, reference(model, *asked), **CLOSE)
    move(model, 9)
    for part, order in zip(parts, orders, strict=True):

        def alone(model: Any, tasks: list[str], part: Any = part) -> torch.Tensor:
            losses = []
            for i, ((prompt, answer), task) in enumerate(zip(generated(part), tasks, strict=True)):
                logits = model(input_ids=torch.tensor([prompt + answer]), adapter_names=[task]).logits
                logits, kl = logits[0, len(prompt) - 1 : -1], 0.0
                logps = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
                if name == "GRPO":
                    log_ratio = logps - part["old_per_token_logps"][i][: len(answer)]
                    away = part["ref_per_token_logps"][i][: len(answer)] - logps
                    kl = 0.3 * (away.exp() - away - 1)
                else:
                    log_ratio = logps.sum() - part["old_logps"][i]
                ratio, advantage = log_ratio.exp(), part["advantages"][i]
                gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                losses.append((kl - gain).mean())
            return torch.stack(losses).mean()

        assert_as_alone(trainer, alone, order, part)


def test_what_is_generated_is_of_each_prompts_task(tmp_path):
    greedy = GENERATED | {"generation_kwargs": {"do_sample": False, "min_new_tokens": 5}}
    trainer = trainer_of("GRPO", tmp_path, PROMPTS, reward_funcs=reward, **greedy)
    batch_of(trainer)
    differ = 0
    for part in trainer._buffered_inputs:
        for (prompt, answer), task in zip(generated(part), check_order(part), strict=True):
            for asked in TASKS:
                options = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "adapter_names": [asked]}
                found = trainer.model.generate(input_ids=torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
                assert asked != task or found == answer
                differ += found != answer
    assert differ


def test_packed_rows_have_names_of_tasks():
    rows = {
        "input_ids": [[1, 2], [3], [4, 5, 6]],
        "labels": [[1, -100], [3], [4, 5, 6]],
        "task": [1, 0, 1],
        "x": [0] * 3,
    }
    dataset = Dataset.from_dict(rows)
    packed = pack_rows(dataset, 4)
    assert packed.to_list() == [
        {"input_ids": [4, 5, 6, 3], "labels": [4, 5, 6, 3], "task": [1, 0], "seq_lengths": [3, 1]},
        {"input_ids": [1, 2], "labels": [1, -100], "task": [1], "seq_lengths": [2]},
    ]
    named = dataset.cast_column("task", ClassLabel(names=["code", "math"]))
    assert pack_rows(named, 4)["task"] == [["math", "code"], ["math"]]


def test_packed_rows_are_shuffled_as_trl_shuffles_them(tmp_path):
    """The packer sorts by length, whatever order it is given."""
    rows = [{"input_ids": [9] * length, "labels": [9] * length, "task": "math"} for length in (5, 8, 6, 7)]
    plain, shuffled = (
        trainer_of("SFT", tmp_path, rows, packing=True, max_length=8, shuffle_dataset=shuffles).train_dataset[
            "seq_lengths"
        ]
        for shuffles in (False, True)
    )
    assert list(plain) == [[8], [7], [6], [5]]
    assert list(shuffled) != list(plain) and sorted(shuffled) == sorted(plain)


def test_a_packed_row_of_one_text(tmp_path):
    trainers = (trainer_of("SFT", tmp_path, sft_rows()[:1], packing=packs, max_length=16) for packs in (True, False))
    packed, padded = (trainer.compute_loss(trainer.model, batch_of(trainer)) for trainer in trainers)
    torch.testing.assert_close(packed, padded, **CLOSE)


@pytest.mark.parametrize(("row", "told"), [
    ({"task": ["math", "code", "math"], "seq_lengths": [2, 1]}, "row 1 of the batch has 3 tokens, .* a packed row has"),
    ({"task": ["math"], "seq_lengths": [2, 1]}, r"`task` \['math'\] and `seq_lengths` \[2, 1\]: a packed row has"),
    ({"task": ["math", "code"]}, r"`task` \['math', 'code'\] and `seq_lengths` \[\]: a packed row has"),
    ({"task": ["math", "code"], "seq_lengths": [2, 2]}, r"3 tokens, .* `seq_lengths` \[2, 2\]: a packed row has"),
    ({"task": "math", "seq_lengths": [2, 1]}, "`task` 'math' and `seq_lengths`"),
    ({"task": ["math", "art"], "seq_lengths": [2, 1]}, "unknown task 'art'"),
])  # fmt: skip
def test_packed_rows_that_say_other_tasks_than_texts_are_refused(row, told):
    packed = [{"input_ids": [5], "seq_lengths": [1], "task": ["code"]}, {"input_ids": [5, 6, 7], **row}]
    collator = WithTasks(lambda rows: {"input_ids": torch.tensor([[i for r in rows for i in r["input_ids"]]])}, TASKS)
    with pytest.raises(ValueError, match=told):
        collator(packed)
    packed[1] |= {"task": ["math", "code"], "seq_lengths": [1, 2]}
    assert collator(packed)["task_ids"].tolist() == [[1, 0, 1, 1]]


def test_a_batch_whose_texts_lie_in_another_order_is_refused():
    collator = WithTasks(lambda rows: {"input_ids": torch.tensor([[8, 5, 6]])}, TASKS)
    with pytest.raises(ValueError, match="which task each part belongs to is not known"):
        collator([{"input_ids": [5, 6], "task": "math"}, {"input_ids": [8], "task": "code"}])


def test_packed_rows_in_padded_batches_are_refused(tmp_path):
    """TRL masks nothing between the texts of an evaluation that alone is packed."""
    with pytest.raises(ValueError, match="eval_packing=True needs packing=True"):
        trainer_of("SFT", tmp_path, sft_rows(), eval_dataset=Dataset.from_list(sft_rows()), eval_packing=True)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_texts_of_several_tasks_are_not_cut(tmp_path, strategy):
    with pytest.raises(ValueError, match=f"packing_strategy='{strategy}' .*: texts of several tasks are packed whole"):
        trainer_of("SFT", tmp_path, sft_rows(), packing=True, packing_strategy=strategy)


def leaking(module, query, key, value, attention_mask, scaling=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def test_a_model_whose_packed_texts_see_each_other_is_refused(tmp_path):
    AttentionInterface.register("leaking", leaking)
    AttentionMaskInterface.register("leaking", lambda *_, **__: None)
    base = tiny.llama(eos_token_id=1)
    base.set_attn_implementation("leaking")
    trainer = trainer_of("SFT", tmp_path, sft_rows(), adapted(base), packing=True, max_length=16)
    with pytest.raises(ValueError, match="with 'leaking' attention logits of a packed text are off by"):
        trainer.compute_loss(trainer.model, batch_of(trainer))
    whole = batch_of(trainer)
    first = int((whole["position_ids"][0] == 0).nonzero()[1])
    alone = {name: value[:, :first] for name, value in whole.items() if name in ("input_ids", "labels", "position_ids")}
    alone["task_ids"] = whole["task_ids"][:, :first]
    trainer.compute_loss(trainer.model, alone)  # a row of one text proves nothing
    with pytest.raises(ValueError, match="rows of several texts need padding_free=True"):
        trainer.compute_loss(trainer.model, {name: value for name, value in whole.items() if name != "position_ids"})
    with pytest.raises(ValueError, match="logits of a packed text are off by"):
        trainer.compute_loss(trainer.model, whole)
    base = tiny.llama(eos_token_id=1)
    base.set_attn_implementation("leaking")
    padded = trainer_of("SFT", tmp_path, sft_rows(), adapted(base))
    assert_as_alone(padded, sft_alone)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_what_a_user_of_trl_meets_first_names_the_remedy(tmp_path, name):
    rows = sft_rows() if name == "SFT" else pairs()
    args = arguments(getattr(trl, f"{name}Config"), tmp_path)
    plain = getattr(trl, f"{name}Trainer")(
        model=adapted(), args=args, processing_class=tokenizer(), train_dataset=Dataset.from_list(rows)
    )
    with pytest.raises(ValueError, match=r"in TRL: alora_kernels.integrations.trl.with_tasks\(SFTTrainer\)"):
        plain.train()


def test_what_cannot_be_right_is_refused(tmp_path):
    nameless = [{key: value for key, value in row.items() if key != "task"} for row in sft_rows()]
    with pytest.raises(ValueError, match=r"a dataset has no `task` column \(a name per row\), only input_ids"):
        trainer_of("SFT", tmp_path, nameless)
    with pytest.raises(ValueError, match="train_dataset has no `task` column"):
        trainer_of("DPO", tmp_path, [{k: v for k, v in row.items() if k != "task"} for row in pairs()])
    with pytest.raises(ValueError, match="unknown task 'art': valid tasks are math, code"):
        trainer_of("DPO", tmp_path, [row | {"task": "art"} for row in pairs()])
    with pytest.raises(ValueError, match="no active adapter picks by task"):
        trainer_of("SFT", tmp_path, sft_rows(), tiny.llama(), peft_config=config(routing="soft"))
    others = [type(n, (trl.GRPOTrainer,), {"__module__": "trl.experimental.other"}) for n in ("GRPOTrainer", "Other")]
    for kind in (transformers.Trainer, *others, 1):
        with pytest.raises(
            TypeError, match=f"with_tasks knows SFTTrainer, .* their subclasses, got {re.escape(repr(kind))}"
        ):
            with_tasks(kind)
    assert issubclass(with_tasks(type("Mine", (trl.GRPOTrainer,), {})), trl.GRPOTrainer)
    trainer = trainer_of("GRPO", tmp_path, PROMPTS, reward_funcs=reward, **GENERATED)
    with pytest.raises(ValueError, match="the batch says no task of its rows"):
        trainer._generate_and_score_completions([{"prompt": "w5"}])
    asked = type("Asked", (), {"use_vllm": True})()
    with pytest.raises(ValueError, match="use_vllm=True generates with weights that one task was merged into"):
        type(trainer)(adapted(), reward, asked)
    with (
        trainer._routed({"task_ids": torch.tensor([0, 1, 1])}),
        pytest.raises(ValueError, match="task_ids has 3 entries .* but the batch has 2 rows"),  # those that use a tool
    ):
        trainer._generate_single_turn([[5], [6]], None, {}, 1)
    with pytest.raises(ValueError, match="the batch says no task of its rows"):
        trainer.compute_loss(trainer.model, {})


def a_of(trainer: Any) -> torch.Tensor:
    return torch.stack([p.detach().clone() for n, p in trainer.model.named_parameters() if "_A.default" in n][:2])


def test_absent_tasks_stay_as_they_are(tmp_path):
    rows = sft_rows()[:1] + sft_rows()[3:]  # of math alone
    for keeps in (True, False):
        trainer = trainer_of("SFT", tmp_path, rows, weight_decay=0.1)
        trainer._keeps = keeps
        before = a_of(trainer)
        trainer.train()
        after = a_of(trainer)
        assert not torch.equal(after[:, 0], before[:, 0])
        assert torch.equal(after[:, 1], before[:, 1]) == keeps


def test_tasks_that_train_only_leaves_out_stay_though_they_have_rows(tmp_path):
    trainer = trainer_of("SFT", tmp_path, sft_rows(), weight_decay=0.1)
    train_only(trainer.model, ["code"])
    before = a_of(trainer)
    trainer.train()
    assert torch.equal(a_of(trainer)[:, 0], before[:, 0]) and not torch.equal(a_of(trainer)[:, 1], before[:, 1])
    trainer._keeps = False
    with pytest.raises(ValueError, match="train_only with keep_absent_tasks=False"):
        trainer.train()


def test_versions_that_were_not_tested_are_told_of_once():
    integration._check_version.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for version in ("1.10.0", "1.16.3", "2.0.0.dev0", "2.0.0.dev0"):
            integration._check_version(version)
    assert [str(w.message)[:40] for w in caught] == ["TRL 2.0.0.dev0 was not tested with tasks"]
