"""The playground in a real browser, on the real application around a fake engine: its contract and more."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import chromium
import pytest
from enginefakes import BOOM, CARDS, FakeEngine, FakeStore
from httpserver import running

from alora_kernels.adapters.asking import Prompt
from alora_kernels.adapters.cards import TaskCard
from alora_kernels.serving import EngineConfig
from alora_kernels.serving.http import ServerConfig
from alora_kernels.serving.request import QueueFullError, RequestError

pytest.register_assert_rewrite("pagecontract")
from pagecontract import ENDED, TASKS, PageContract, address, ask, choose, overflow, part, state, text  # noqa: E402


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.launched() as browser:
        yield browser


class TestOnTheServer(PageContract):
    """The real HTTP application around an engine without a model, whose pace and faults can be told."""

    @pytest.fixture
    def engine(self) -> Iterator[FakeEngine]:
        with FakeEngine(TASKS, EngineConfig(max_context=4096), words=5000, delay=0.01, echo=True) as engine:
            yield engine

    @pytest.fixture
    def page_server(self, engine: FakeEngine) -> Iterator[str]:
        with running(engine) as url:
            yield url

    def test_more_answers_than_connections(self, page: Any, engine: FakeEngine) -> None:
        """Eight streams at once would take all six of a browser's connections, and the header would stand still."""
        tasks = [f"task-{n}" for n in range(8)]
        engine.store = FakeStore(tasks)
        page.wait_for_selector('input[value="task-7"]')  # the list follows what the server knows
        engine.allowed = 3
        choose(page, *tasks)
        ask(page)
        state(page, "task-4", "streaming")
        assert [part(page, task, "state").inner_text() for task in tasks[5:]] == ["queued"] * 3
        asked = engine.stats_asked
        page.wait_for_timeout(2000)
        assert engine.stats_asked > asked + 1
        assert page.locator("#batch").inner_text() == "5 / 32"
        part(page, "task-7", "stop").click()
        assert state(page, "task-7", ENDED) == "stopped"
        engine.allowed = 10**9
        assert {state(page, task, ENDED) for task in tasks[:7]} == {"done"}
        assert "task-7" not in [task for _, task, _ in engine.submitted]

    @pytest.mark.parametrize(
        ("fault", "said"),
        [
            (RequestError("the prompt is longer than the context"), "the prompt is longer than the context"),
            (QueueFullError(256, 30.0), "256 requests are waiting already: try again in about 30 s"),
            (BOOM, "the answer failed: boom, as asked"),
            ("cut", "The connection ended before the answer did"),
        ],
        ids=["refused", "full", "fails in the stream", "cut"],
    )
    def test_errors_are_shown_and_the_others_go_on(self, page: Any, engine: FakeEngine, fault: Any, said: str) -> None:
        def cut(route: Any) -> None:
            event = json.dumps({"choices": [{"index": 0, "text": "one word", "finish_reason": None}]})
            if route.request.post_data_json["model"] == "spam":
                route.fulfill(content_type="text/event-stream", body=f"data: {event}\n\n")
            else:
                route.continue_()

        engine.faults = {"spam": fault}
        if fault == "cut":
            page.route("**/v1/completions", cut)
        choose(page, "movie", "spam")
        ask(page)
        assert state(page, "spam", ENDED) == "error"
        assert page.locator('.card[data-task="spam"] .problem').inner_text() == said
        status = {RequestError: "HTTP 400", QueueFullError: "HTTP 429"}.get(type(fault))
        assert status is None or part(page, "spam", "finish").inner_text() == status
        if status == "HTTP 429":
            assert re.fullmatch(r"Again in (30|2\d) s", part(page, "spam", "again").inner_text())
        assert state(page, "movie", ENDED) == "done"

    def test_a_task_that_was_unloaded_leaves_the_list_and_is_named(self, page: Any, engine: FakeEngine) -> None:
        choose(page, "movie", "spam")
        ask(page, max_tokens=2)
        assert {state(page, task, ENDED) for task in ("movie", "spam")} == {"done"}
        page.evaluate("Object.defineProperty(document, 'hidden', { value: true })")  # /stats is not asked any more
        engine.store.unload("spam")
        part(page, "spam", "again").click()
        assert state(page, "spam", ENDED) == "error"
        said = page.locator('.card[data-task="spam"] .problem').inner_text()
        assert said.startswith("no model or task is called 'spam'")
        assert part(page, "spam", "finish").inner_text() == "HTTP 404"
        page.locator('input[value="spam"]').wait_for(state="detached")

    def test_an_answer_without_text_says_so(self, page: Any, engine: FakeEngine) -> None:
        """A model may end at its first token; a card that stayed blank would look broken."""
        engine.words = 0
        choose(page, "movie")
        ask(page)
        assert state(page, "movie", ENDED) == "done"
        assert self.note(page) == "The answer has no text."
        assert text(page, "movie") == ""
        engine.words, engine.allowed = 5, 0
        part(page, "movie", "again").click()
        state(page, "movie", "waiting")
        assert self.note(page) == ""
        part(page, "movie", "stop").click()
        assert state(page, "movie", ENDED) == "stopped"
        assert self.note(page) == "Stopped before the first word."

    def note(self, page: Any) -> str:
        return page.locator(".answer").evaluate("answer => JSON.parse(getComputedStyle(answer, '::before').content)")

    @pytest.mark.parametrize(("given", "said"), [("draining", "finishes what runs"), ("dreaming", '"dreaming"')])
    def test_a_state_other_than_ready(self, page: Any, engine: FakeEngine, given: str, said: str) -> None:
        engine._table.state = given
        page.locator("#banner").filter(has_text=said).wait_for()
        assert page.locator("#state").inner_text() == given
        engine._table.state = "ready"
        page.locator("#banner").wait_for(state="hidden")

    def test_a_key_is_asked_for(self, context: Any, engine: FakeEngine) -> None:
        config = ServerConfig(base_model_id="base", api_keys=("se'cret",))
        with running(engine, config) as url:
            self.with_a_key(context.new_page(), url, engine)

    def with_a_key(self, page: Any, url: str, engine: FakeEngine) -> None:
        page.goto(url)
        page.get_by_label("asks for an API key").wait_for()
        asked = engine.stats_asked
        for key, then in (("wrong", "The server refused this key."), ("se'cret", "")):
            page.fill("#key", key)
            page.click("#key-form button")
            if then:
                page.get_by_text(then).wait_for()
        page.wait_for_selector("#choices input")
        assert engine.stats_asked > asked
        page.locator("#key-form").wait_for(state="hidden")
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        ask(page)
        assert state(page, "movie", ENDED) == "done"
        assert "prompt=A" in address(page, "prompt=") and "se'cret" not in unquote(page.url)
        page.click("#copy-curl")
        page.get_by_text("Copied as curl").wait_for()
        assert "se'cret" not in page.evaluate("navigator.clipboard.readText()")

    def test_how_tasks_were_asked_is_shown_and_fills_the_prompt(self, page: Any, engine: FakeEngine) -> None:
        hints = page.locator("#hints")
        assert hints.is_hidden()
        choose(page, "spam")
        assert hints.is_hidden()  # it does not say
        choose(page, *TASKS)
        page.get_by_text("How these tasks were asked in training").click()
        assert hints.locator("h3").all_inner_texts() == ["movie", "news"]
        assert hints.locator("pre").all_inner_texts() == [CARDS[name].template for name in ("movie", "news")]
        assert page.get_by_text("answers: positive, negative").is_visible()
        assert page.get_by_text("Not known of spam.").is_visible()
        page.get_by_role("button", name="Use as prompt: movie").click()
        assert page.input_value("#prompt") == CARDS["movie"].sample
        page.get_by_role("button", name="Use as prompt: news").click()
        page.keyboard.type("Rain")  # the first placeholder is selected: typing fills it in
        assert page.input_value("#prompt") == "News: Rain\nSection:"
        page.get_by_role("checkbox", name="movie").uncheck()
        assert hints.locator("h3").all_inner_texts() == ["news"]
        assert page.seen.errors == []

    def test_a_text_goes_into_the_prompt_of_each_task_unless_it_is_sent_as_it_is(
        self, page: Any, engine: FakeEngine
    ) -> None:
        cards = CARDS | {"news": TaskCard(chat=True, chat_template="{0} / {1} >", system="be short")}
        engine.store = FakeStore(TASKS, cards)
        page.reload()
        page.wait_for_selector("#choices input")
        page.get_by_role("button", name="Preset: news").click()
        assert page.input_value("#prompt") == "" and page.evaluate("document.activeElement.id") == "prompt"
        choose(page, *TASKS)
        page.get_by_text("How these tasks were asked in training").click()
        assert page.locator(".hint pre").all_inner_texts()[1:] == ['a chat after the system prompt "be short"']
        assert page.get_by_role("button", name="Use as prompt").count() == 1
        choose(page, *TASKS)
        ask(page, "rain", max_tokens=2)
        assert {state(page, task, ENDED) for task in TASKS} == {"done"}
        page.get_by_role("checkbox", name="Ask each as in its training").uncheck()
        ask(page, "rain", max_tokens=2)
        assert {state(page, task, ENDED) for task in TASKS} == {"done"}
        own = {"movie": Prompt("Review: rain\nSentiment:", spaced=True), "spam": "rain",
               "news": Prompt("be short / rain >", bos=False)}  # fmt: skip
        sent = [(task, prompt) for prompt, task, _ in engine.submitted]
        assert dict(sent[:3]) == own and dict(sent[3:]) == dict.fromkeys(TASKS, "rain")
        assert page.seen.errors == []

    def test_the_page_that_describes_the_interface(self, page: Any, page_server: str) -> None:
        page.goto(f"{page_server}/docs")
        page.get_by_role("heading", name="POST /v1/chat/completions").wait_for()
        row = page.locator("section").filter(has_text="POST /v1/completions").locator("tr")
        assert row.filter(has_text="apply_template").locator("td").inner_text() == "boolean or null"
        assert row.filter(has_text="logprobs").locator("td").inner_text() == "integer 0 to 5 or null"
        assert row.filter(has_text="prompt").locator("th").inner_text() == "prompt *"
        assert page.seen.errors == [] and page.seen.origins == {page_server} and overflow(page) <= 0

    def test_hints_of_a_hostile_folder_are_text(self, page: Any, engine: FakeEngine) -> None:
        markup = "<img src=x onerror=\"document.title='owned'\">{text}"
        engine.store = FakeStore(TASKS, {"movie": TaskCard(markup, (markup,) * 300)})
        page.reload()
        page.wait_for_selector("#choices input")
        choose(page, "movie")
        page.get_by_text("How these tasks were asked in training").click()
        assert page.locator(".hint pre").inner_text() == markup
        assert page.locator("#hints img").count() == 0 and page.title() == "alora playground"
        assert overflow(page) <= 0

    def test_three_hundred_tasks(self, page: Any, engine: FakeEngine) -> None:
        engine.store = FakeStore([f"task-{n:03d}" for n in range(300)])
        page.get_by_text("of 301 chosen").wait_for()
        assert page.get_by_text("more: search").is_visible()
        page.fill("#search", "TASK 29")
        assert page.locator("#choices input").count() == 13  # 029, 129, 229 and 290 to 299
        choose(page, "task-290")
        page.fill("#search", "no such name")
        assert page.get_by_role("checkbox", name="task-290").is_checked()  # what is chosen stays in view
        page.fill("#search", "")
        page.click("#all")
        assert page.get_by_text("24 of 301 chosen (the most)").is_visible()
        assert page.get_by_role("checkbox", name="task-150").is_disabled()

    def test_what_is_sent(self, page: Any, engine: FakeEngine) -> None:
        choose(page, "movie")
        page.fill("#temperature", "0.7")
        page.fill("#stop", "END\n\\n\\n")
        ask(page, "two\nlines", max_tokens=9)
        state(page, "movie", ENDED)
        body = {"model": "movie", "prompt": "two\nlines", "max_tokens": 9, "temperature": 0.7, "stop": ["END", "\n\n"]}
        more = {"apply_template": True, "stream": True, "stream_options": {"include_usage": True}}
        assert page.seen.posts == [body | more]

    def test_nothing_is_sent_that_is_not_complete(self, page: Any, engine: FakeEngine) -> None:
        ask(page)
        page.get_by_text("Choose at least one task.").wait_for()
        choose(page, "movie")
        ask(page, max_tokens=0)
        page.fill("#stop", "a\nb\nc\nd\ne")
        ask(page)
        assert page.locator("#stop").evaluate("field => field.validationMessage") == "At most four stop texts"
        assert page.locator(".card").count() == 0
        assert page.seen.posts == []

    def test_a_hidden_tab_asks_nothing(self, page: Any, engine: FakeEngine) -> None:
        """Headless tabs are never hidden, so the page is told that it is."""
        hide = "value => { Object.defineProperty(document, 'hidden', { value, configurable: true });"
        hide += " document.dispatchEvent(new Event('visibilitychange')); }"
        page.evaluate(hide, True)
        page.wait_for_timeout(600)
        asked = engine.stats_asked
        page.wait_for_timeout(1200)
        assert engine.stats_asked == asked
        page.evaluate(hide, False)
        page.wait_for_timeout(600)
        assert engine.stats_asked > asked

    def test_the_copied_curl_runs(self, page: Any, engine: FakeEngine) -> None:
        if shutil.which("curl") is None:
            pytest.skip("no curl on this machine")
        prompt = 'it\'s "quoted" $HOME `date` \\ and\nünïcode 🙂'
        sent = self.copied(page, "#copy-curl", prompt)
        done = subprocess.run(["bash", "-c", sent], capture_output=True, text=True, timeout=60, env=quiet())
        assert done.returncode == 0, done.stderr
        assert [(task, asked) for asked, task, _ in engine.submitted] == self.sent(prompt)
        answers = [json.loads(line) for line in done.stdout.replace("}{", "}\n{").splitlines()]
        assert [answer["choices"][0]["text"].split()[0] for answer in answers] == ["movie", "spam"]

    def test_the_copied_python_runs(self, page: Any, engine: FakeEngine) -> None:
        pytest.importorskip("openai", reason="the snippet uses the openai package: pip install openai")
        prompt = 'it\'s "quoted" \\ {braces} and\nünïcode 🙂'
        code = self.copied(page, "#copy-python", prompt)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, encoding="utf-8", env=quiet()
        )
        assert done.returncode == 0, done.stderr
        assert [(task, asked) for asked, task, _ in engine.submitted] == self.sent(prompt)
        assert done.stdout.startswith("movie: movie read: ")

    def sent(self, prompt: str) -> list[tuple[str, Any]]:
        return [("movie", Prompt(f"Review: {prompt}\nSentiment:", spaced=True)), ("spam", prompt)]

    def copied(self, page: Any, button: str, prompt: str) -> str:
        choose(page, "movie", "spam")
        page.fill("#prompt", prompt)
        page.fill("#stop", "it's")
        page.click(button)
        page.get_by_text(re.compile("^Copied as")).wait_for()
        return page.evaluate("navigator.clipboard.readText()")


def quiet() -> dict[str, str]:
    """This environment without proxies: the server is on this machine."""
    return {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {"PYTHONUTF8": "1"}


def test_a_missing_browser_is_a_failure_where_one_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chromium.shutil, "which", lambda name: None)
    monkeypatch.setattr(chromium.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("ALORA_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"), chromium.launched():
        pass
    monkeypatch.delenv("ALORA_REQUIRE_BROWSER")
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"), chromium.launched():
        pass
