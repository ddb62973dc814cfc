"""The playground in a real browser on the real engine: the contract, and that a card has its own task's text.

The model has no end of text, so an answer has as many tokens as are asked for. A step takes a few milliseconds here,
so answers that must still run after some clicks get nearly the whole context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import chromium
import pytest
from httpserver import running

from alora_kernels.adapters.asking import Prompt
from alora_kernels.adapters.cards import TaskCard, write_task_cards
from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore
from alora_kernels.serving.http import ServerConfig
from tests.support.adapters import alora_folder, tiny_base

pytest.register_assert_rewrite("pagecontract")
from pagecontract import (  # noqa: E402
    ENDED,
    NARROW,
    TASKS,
    WIDE,
    PageContract,
    address,
    ask,
    choose,
    chosen,
    opened,
    part,
    runs,
    shown,
    state,
    text,
)

BASE = "tiny-random"
NEVER = -1  # no token has this id
CONTEXT = 2048
SEED = 3  # with both of the tiny model's tokenizers, every task writes whole characters from the start
PROMPT = "A film without a plot."
CARDS = {
    "movie": TaskCard("Review: {text}\nSentiment:", sample=f"Review: {PROMPT}\nSentiment:"),
    "spam": TaskCard("Message: {text}\nSpam:"),
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium.launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = alora_folder(tmp_path_factory.mktemp("adapters") / "three", tiny_base()[0], TASKS, seed=SEED)
    write_task_cards(path, CARDS)
    return path


@contextmanager
def served(folder: Path) -> Iterator[tuple[Engine, str]]:
    """An engine that was started, and the address of the server around it."""
    base, tokenizer = tiny_base()
    base.generation_config.eos_token_id = NEVER
    store = TaskStore.open(base, [folder])
    try:
        config = EngineConfig(max_batch=8, max_context=CONTEXT, cache_tokens=4 * CONTEXT)
        with Engine(base, tokenizer, store, config) as engine, running(engine, ServerConfig(BASE)) as url:
            yield engine, url
    finally:
        store.close()


@pytest.fixture(scope="module")
def server(browser: Any, folder: Path) -> Iterator[tuple[Engine, str]]:
    """One for all tests; the browser comes first, so that without one nothing is started."""
    with served(folder) as both:
        yield both


class TestOnTheEngine(PageContract):
    """The contract, and the model's own answers."""

    several = 300
    endless = 1900

    @pytest.fixture
    def page_server(self, server: tuple[Engine, str]) -> str:
        return server[1]

    def test_each_card_has_the_text_of_its_own_task(self, page: Any, server: tuple[Engine, str]) -> None:
        choose(page, BASE, *TASKS)
        page.get_by_role("checkbox", name="Ask each as in its training").uncheck()
        ask(page, PROMPT, max_tokens=24)
        answers = {name: (state(page, name, ENDED), text(page, name)) for name in (BASE, *TASKS)}
        wanted = Sampling(max_tokens=24, temperature=0)
        for name, task in zip((BASE, *TASKS), (None, *TASKS), strict=True):
            assert answers[name] == ("done", server[0].submit(PROMPT, task, wanted).result(60).text)
        assert len(set(answers.values())) == 4  # or the tasks could be mixed up unseen

    @pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
    def test_a_preset_is_answered_in_view(self, page: Any, server: tuple[Engine, str], size: dict[str, int]) -> None:
        """From one click to the engine's own text; with nothing scrolled, all that was used is still to be seen."""
        page.set_viewport_size(size)
        page.reload()
        choose(page, "news")
        page.get_by_role("button", name="Preset: movie").click()
        assert chosen(page) == ["movie"] and page.input_value("#prompt") == CARDS["movie"].sample
        page.keyboard.press("Enter")  # Send has the focus, so that no phone puts a keyboard over the page
        assert state(page, "movie", ENDED) == "done"
        asked, wanted = Prompt(CARDS["movie"].sample, spaced=True), Sampling(max_tokens=64, temperature=0)
        assert text(page, "movie") == server[0].submit(asked, "movie", wanted).result(60).text
        assert "prompt=Review" in address(page, "task=movie")
        choose(page, "spam")
        page.click("#send")
        assert {state(page, task, ENDED) for task in ("movie", "spam")} == {"done"}
        assert page.evaluate("scrollY") == 0
        places = [page.locator(each).bounding_box() for each in ("#picker", "#prompt", "#send", ".card >> nth=0")]
        assert all(place["y"] >= 0 and place["y"] + place["height"] <= size["height"] for place in places), places
        assert page.locator(".answer >> nth=1").bounding_box()["y"] < size["height"] - 20  # a line of the second

    def test_a_prompt_too_long_is_refused_in_the_engines_words(self, page: Any) -> None:
        choose(page, "movie")
        ask(page, "word " * CONTEXT)
        assert state(page, "movie", ENDED) == "error"
        assert f"may have {CONTEXT}: shorten it" in page.locator(".problem").inner_text()

    def test_the_header_follows_the_batch(self, page: Any, page_server: str) -> None:
        choose(page, *TASKS)
        ask(page, max_tokens=self.endless)
        shown(page, "batch", "3 / 8")
        assert page.locator("#batch-bar").get_attribute("aria-valuenow") == "3"
        page.click("#stop-all")
        shown(page, "batch", "0 / 8")
        shown(page, "cache", "0 %")
        runs(page, page_server, 0)


def test_an_engine_that_stops_is_shown(browser: Any, folder: Path) -> None:
    """A task that is unloaded leaves the list; an answer that is cut off keeps its text and says why it ends there."""
    with served(folder) as (engine, url):
        page = browser.new_page()
        opened(page, url)
        choose(page, "movie", "spam")
        ask(page, max_tokens=3)
        assert state(page, "movie", ENDED) == state(page, "spam", ENDED) == "done"
        engine.store.unload("spam")
        page.locator('input[value="spam"]').wait_for(state="detached")
        ask(page, max_tokens=TestOnTheEngine.endless)
        state(page, "movie", "streaming")
        engine.stop()
        assert state(page, "movie", ENDED) == "error"
        assert page.locator(".problem").inner_text()
        assert text(page, "movie").strip()
        shown(page, "state", "stopped")
        page.get_by_text("nothing is answered any more").wait_for()
        part(page, "movie", "again").click()
        page.locator(".problem").filter(has_text="takes no new requests").wait_for()
        page.close()
