"""Chats are judged by their last turn: its loss, the choice of a whole turn, or what is written after the prompt."""

from __future__ import annotations

import json

from alora_kernels import data
from alora_kernels.adapters.asking import chat_text
from alora_kernels.recipes import judge
from alora_kernels.recipes.job import label_words, load
from alora_kernels.recipes.recipe import load_recipe
from alora_kernels.training.answers import Written
from tests.support.cli import recipe

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<file_sep>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENING = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"


def chats(tmp_path, template):
    """A run on chats of two turns each: one task answers yes or no, two answer in texts."""

    def turns(i: int, answer: str) -> list[dict[str, str]]:
        said = ("user", f"Hello {i}."), ("assistant", "Hello."), ("user", f"Is {i} odd?"), ("assistant", answer)
        return [{"role": role, "content": content} for role, content in said]

    answers = {
        "odd": ["no", "yes"],
        "free": [f"it is {i} so" for i in range(40)],
        "plain": [f"say {i}" for i in range(40)],
    }
    for name, own in answers.items():
        lines = [json.dumps({"messages": turns(i, own[i % len(own)])}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "t.jinja").write_text(template)
    free = "{name: free, source: free.jsonl, metric: exact}"
    tasks = f"[{{name: odd, source: odd.jsonl, metric: choice}}, {free}, {{name: plain, source: plain.jsonl}}]"
    return load(
        load_recipe(recipe(tmp_path, tmp_path, tasks=tasks, chat_template="t.jinja", max_length=256, test_size=8))
    )


def test_few_answers_of_chats_are_no_label_words_unless_the_task_says_so(tmp_path):
    """What an assistant said must not leave with an adapter as a task's words."""
    job = chats(tmp_path, TEMPLATE)
    assert job.choices.keys() == {"odd"} and job.metrics == {"odd": "choice", "free": "exact", "plain": "loss"}
    text = job.text
    assert label_words(text).keys() == set() and label_words(text, job.recipe.tasks)["odd"] == ["no", "yes"]


def test_what_a_template_puts_before_an_answer_is_no_part_of_it(tmp_path, monkeypatch):
    job = chats(tmp_path, TEMPLATE.replace("{{ m.content }}", OPENING + "{{ m.content }}"))

    said = next(row["answer"] for row in job.text["test"] if row["task"] == "free")

    def writes(model, prompts, **how):
        return [Written(job.tokenizer(f"<think>\n\n</think>\n\n{said}").input_ids, True) for _ in prompts]

    monkeypatch.setattr(judge, "written_answers", writes)
    assert judge.judge(job, "x").by["exact"]["free"] == 1 / 8

    job.tokenizer.add_tokens(["</think>"])  # a token of its own, as other models have it, which ends no answer
    inside, end = job.tokenizer.convert_tokens_to_ids(["</think>", job.tokenizer.eos_token])
    ends = judge._ends(job, [{"labels": [data.IGNORE, 5, inside, 6, end]}])
    assert end in ends and inside not in ends


def test_chats(tmp_path, monkeypatch):
    job = chats(tmp_path, TEMPLATE)
    asked, ends = [], set()

    def writes(model, prompts, *, tasks, **how):
        asked.extend(prompts)
        ends.update(how["ends"])
        return [Written(job.tokenizer("It is 7 so").input_ids, True) for _ in prompts]

    monkeypatch.setattr(judge, "written_answers", writes)
    seen = {}
    choose, lose = judge.choice_accuracy, judge.answer_loss
    monkeypatch.setattr(
        judge, "choice_accuracy", lambda m, rows, c, **h: seen.update(odd=(rows, c)) or choose(m, rows, c, **h)
    )
    monkeypatch.setattr(judge, "answer_loss", lambda m, rows, **h: seen.update(plain=rows) or lose(m, rows, **h))
    scores = judge.judge(job, "x")

    rows = {task: [r for r in job.text["test"] if r["task"] == task] for task in ("odd", "free", "plain")}
    ids = lambda text: job.tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    prompts = [chat_text(job.tokenizer, json.loads(r["messages"])[:-1], TEMPLATE, ask=True) for r in rows["free"]]
    assert sorted(row["input_ids"] for row in asked) == sorted(map(ids, prompts))
    assert scores.by["exact"]["free"] == sum(r["answer"] == "it is 7 so" for r in rows["free"]) / 8
    turn = job.tokenizer.get_vocab().get("<file_sep>")  # a token of SmolLM2's that ends no text
    assert turn is None or turn in ends

    chosen, words = seen["odd"]
    assert {job.tokenizer.decode(word).strip() for word in words["odd"]} == {"yes<file_sep>", "no<file_sep>"}
    assert scores.chosen["odd"].total() == len(chosen) == 8
    assert all(right in ("yes", "no") for right, _ in scores.chosen["odd"])
    for row, text in zip(seen["plain"], rows["plain"], strict=True):
        answer = job.tokenizer.decode([label for label in row["labels"] if label != data.IGNORE])
        assert answer.startswith(text["answer"]) and "Hello" not in answer
