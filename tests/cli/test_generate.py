"""`alora generate`: each row of a mixed batch answers as its task alone would, asked as in training; its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModelForCausalLM
from transformers import MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from alora_kernels import data
from alora_kernels.adapters import asking
from alora_kernels.adapters.cards import TaskCard, write_task_cards
from alora_kernels.cli import generate as module
from alora_kernels.cli.app import app
from tests.serving.truth import alone, merged_models
from tests.support.adapters import alora_folder, lora_folder, tiny_base
from tests.support.tiny import gpt2, llama

TASKS = ("movie", "pairs", "help")
CARDS = {
    "movie": TaskCard("Review: {text}\nSentiment:", ("positive", "negative")),
    "pairs": TaskCard("{a} + {b} ="),
    "help": TaskCard(chat=True, system="Be short."),
}
PROMPTS = {
    "movie": "Review: {}\nSentiment:",
    "help": "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = alora_folder(tmp_path_factory.mktemp("run") / "adapter", tiny_base()[0], TASKS)
    write_task_cards(folder, CARDS)
    return folder


def alora(*args: object, code: int = 0, stdin: str | None = None) -> tuple[str, str]:
    """What a call prints on standard output and on standard error."""
    done = CliRunner().invoke(app, ["generate", *map(str, args)], input=stdin, env={"COLUMNS": "200"})
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def rows(*args: object, **more: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in alora(*args, "--json", **more)[0].splitlines()]


def test_a_mixed_batch_answers_as_each_task_alone_asked_as_in_training(adapter):
    texts = ("a warm film", "no")
    said = rows(adapter, *texts, "--task", "movie", "--task", "help", "--task", "__base__", "--max-tokens", 9)
    models, tokenizer = merged_models(adapter, ("movie", "help")), tiny_base()[1]
    asked = [(text, task) for text in texts for task in ("movie", "help", "__base__")]
    assert [(row["text"], row["task"]) for row in said] == asked
    for row, (text, task) in zip(said, asked):
        if task in PROMPTS:
            assert row["prompt"] == PROMPTS[task].format(text)
        ids = tokenizer(row["prompt"]).input_ids
        answer = tokenizer.decode(alone(models.get(task, models[None]), ids, 9), skip_special_tokens=True)
        assert row["answer"] == (answer.removeprefix(" ") if task == "movie" else answer)
        assert row["finish_reason"] in ("stop", "length") and 1 <= row["tokens"] <= 9
    assert len({row["answer"] for row in said}) > 3, "tasks that answer alike could be mixed up unseen"


def test_prompts_of_a_model_that_padding_would_change_are_answered_as_each_alone(tmp_path, monkeypatch):
    tokenizer = tiny_base()[1]
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    base = MambaForCausalLM(MambaConfig(**sizes, eos_token_id=None)).eval()
    folder = alora_folder(tmp_path / "adapter", base, ("one", "two"), target_modules=["in_proj"])
    merged = merged_models(folder, ("one", "two"), base)
    monkeypatch.setattr(data, "load_model", lambda *_, **__: (base, tokenizer))
    said = rows(folder, "no", "a much longer text", "--task", "all", "--raw", "--max-tokens", 5)
    assert [row["task"] for row in said] == ["one", "two"] * 2
    for row in said:
        answer = alone(merged[row["task"]], tokenizer(row["prompt"]).input_ids, 5)
        assert row["answer"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_an_answer_ends_where_the_chat_template_of_its_task_ends_a_turn(tmp_path, monkeypatch):
    base, tokenizer = tiny_base()
    folder = alora_folder(tmp_path / "adapter", base, ("one", "two"))
    end = tokenizer.pad_token_id  # no token that ends a text
    template = "{% for m in messages %}{{ m.content }}" + tokenizer.pad_token + "\n{% endfor %}"
    write_task_cards(folder, {"one": TaskCard(chat=True, chat_template=template)})
    asked = []

    def writes(self, input_ids, **how):
        asked.extend(self.generation_config.eos_token_id)
        return torch.cat([input_ids, torch.tensor([[5, end, 5]])], 1)

    monkeypatch.setattr(PeftModelForCausalLM, "generate", writes)
    (said,) = rows(folder, "x", "--task", "one")
    assert end in asked and tokenizer.eos_token_id in asked
    assert said["finish_reason"] == "stop" and said["tokens"] == 2


def test_what_the_models_own_settings_ask_for_has_no_part_in_an_answer(adapter, monkeypatch):
    usual, (base, tokenizer) = rows(adapter, "a", "--task", "movie", "--max-tokens", 9), tiny_base()
    base.generation_config.repetition_penalty = 1e9
    monkeypatch.setattr(data, "load_model", lambda *_, **__: (base, tokenizer))
    assert rows(adapter, "a", "--task", "movie", "--max-tokens", 9) == usual


def test_all_tasks_by_one_word_and_what_is_shown(adapter):
    shown = alora(adapter, '{"a": 1, "b": 2}', "--task", "all", "--max-tokens", 2)[0].splitlines()
    assert [line.partition(":")[0] for line in shown] == list(TASKS)
    assert rows(adapter, '{"a": 1, "b": 2}', "--task", "pairs", "--max-tokens", 1)[0]["prompt"] == "1 + 2 ="
    shown = alora(adapter, "x", "y", "--task", "movie", "--max-tokens", 1)[0].splitlines()
    assert [line.partition(" -> ")[0] for line in shown] == ["x", "y"]


def test_standard_input_sampling_and_a_space_that_is_no_part_of_an_answer(adapter, monkeypatch):
    monkeypatch.setattr(module, "ROWS", 1)  # of a batch
    how = ("--task", "movie", "--max-tokens", 6, "--temperature", 1, "--seed")
    one, same, other = (rows(adapter, *how, seed, stdin="two\nlines\n") for seed in (1, 1, 2))
    assert one[0]["prompt"] == "Review: two\nlines\nSentiment:" and one == same != other
    monkeypatch.setattr(type(tiny_base()[1]), "decode", lambda *_, **__: " good")
    assert alora(adapter, "--task", "movie", "x")[0].splitlines()[-1] == "good"
    assert alora(adapter, "--task", "movie", "--raw", "x")[0].splitlines()[-1] == " good"


def test_a_stock_lora_is_one_task_and_needs_no_name(tmp_path):
    base, tokenizer = tiny_base()
    folder = lora_folder(tmp_path / "my.lora", base)
    said = rows(folder, "hi", "--max-tokens", 5)[0]
    assert said["task"] == "my.lora" and said["prompt"].endswith("<|im_start|>assistant\n")
    own = rows(folder, "hi", "--max-tokens", 5, "--task", "__base__")[0]["answer"]
    assert own == tokenizer.decode(alone(base, tokenizer(said["prompt"]).input_ids, 5)) != said["answer"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--task", "movie"), "movie answered without a text\n"),
        (("--task", "movie", "--raw"), "without a text: is this the whole of a prompt of its training?"),
        (("--task", "__base__"), "without a text: is this how it was asked in training? Nothing here says how"),
    ],
)
def test_an_empty_answer_is_said(adapter, monkeypatch, options, said):
    monkeypatch.setattr(asking, "answer_ends", lambda model, tokenizer, templates: list(range(len(tokenizer))))
    out, err = alora(adapter, "x", *options)
    assert out == "\n" and said in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["x"], "has movie, pairs, help: say who answers with --task NAME"),
        (["x", "--task", "movis"], "has no task 'movis', did you mean movie? It has movie, pairs, help"),
        (["x", "--task", "zz"], "has no task 'zz'. It has movie"),
        ([" ", "--task", "movie"], "a text is empty"),
        (["x", "--task", "movie", "--top-p", 0], "--top-p must be above 0"),
        (["x", "--task", "movie", "--top-p", 0.5], "give a --temperature above 0 too"),
        (["x", "--task", "movie", "--raw", "--system", "y"], "--system has no place"),
    ],
)
def test_what_is_refused_before_the_model_is_loaded(adapter, loads_nothing, args, said):
    err = alora(adapter, *args, code=2)[1]
    assert said in err and len(err.splitlines()) <= 3


def test_folders_and_methods_without_tasks_are_refused(adapter, tmp_path, loads_nothing):
    assert "give one of its subfolders: adapter" in alora(adapter.parent, "x", code=2)[1]
    (tmp_path / "method.json").write_text('{"settings": {"name": "hydralora", "num_experts": 2}}')
    assert "is of the method hydralora, whose tasks cannot be asked" in alora(tmp_path, "x", code=2)[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["x", "--task", "movie", "--system", "y"], "task 'movie' was trained on single prompts"),
        (["x", "--task", "pairs"], "task 'pairs': it is asked with a, b: send a JSON object"),
        (["word " * 2100, "--task", "movie"], "and this model reads at most 2048: shorten it"),
    ],
)
def test_what_has_no_place_in_a_prompt_is_refused(adapter, args, said):
    assert said in alora(adapter, *args, code=2)[1]


def test_an_adapter_of_another_base_is_named_by_a_shape(adapter, monkeypatch):
    tokenizer = tiny_base()[1]
    for other, said in ((llama(), "but the base maps"), (gpt2(), "the base has no model.layers.")):
        monkeypatch.setattr(data, "load_model", lambda *_, other=other, **__: (other, tokenizer))
        err = alora(adapter, "x", "--task", "movie", "--model", "another", code=2)[1]
        assert said in err and err.strip().endswith("give the base that it was trained on")
