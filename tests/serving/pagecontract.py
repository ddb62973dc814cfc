"""What the playground must do on any server, in a real browser: `PageContract`, tests to inherit.

Waiting is done by locators. `page.wait_for_function` looks again with `eval`, which the page's policy forbids: it works
only where the first look succeeds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest

WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
TASKS = ["movie", "spam", "news"]
ENDED = "done|stopped|error"


def opened(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#choices input")
    page.click("#none")


def opened_as_it_is(page: Any, url: str) -> None:
    """With what the address says."""
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_selector("#choices input")


def address(page: Any, part: str) -> str:
    """The page's address, once it has this part."""
    page.wait_for_url(lambda url: part in url)
    return page.url


def chosen(page: Any) -> list[str]:
    return page.locator("#choices input:checked").evaluate_all("boxes => boxes.map((box) => box.value)")


def choose(page: Any, *tasks: str) -> None:
    for task in tasks:
        page.get_by_role("checkbox", name=task).check()


def ask(page: Any, prompt: str = "A film without a plot.", max_tokens: int = 40) -> None:
    page.fill("#prompt", prompt)
    if page.locator("#more").get_attribute("open") is None:  # folded away on a phone
        page.click("#more summary")
    page.fill("#max-tokens", str(max_tokens))
    page.click("#send")


def state(page: Any, task: str, wanted: str) -> str:
    """Waits until the task's card has a state that matches, and returns it."""
    shown = page.locator(f'.card[data-task="{task}"] [data-is="state"]')
    shown.filter(has_text=re.compile(f"^({wanted})$")).wait_for()
    return shown.inner_text()


def shown(page: Any, id: str, wanted: str) -> None:
    """Waits until the element says exactly this."""
    page.locator(f"#{id}").filter(has_text=re.compile(f"^{re.escape(wanted)}$")).wait_for()


def text(page: Any, task: str) -> str:
    return page.locator(f'.card[data-task="{task}"] .answer').text_content()


def part(page: Any, task: str, name: str) -> Any:
    return page.locator(f'.card[data-task="{task}"] [data-is="{name}"]')


def overflow(page: Any) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def stats(page: Any, url: str) -> dict[str, Any]:
    return page.request.get(f"{url}/stats").json()


def runs(page: Any, url: str, wanted: int) -> None:
    """Waits until the server has so many answers at work."""
    end = time.monotonic() + 60
    while (now := stats(page, url)["running"]) != wanted:
        assert time.monotonic() < end, f"the server runs {now} answers, not {wanted}"
        page.wait_for_timeout(20)


class PageContract:
    """Holds on every server with the tasks movie, spam and news; a subclass gives `page_server`, the address of one.

    Its module gives `browser`, made by `chromium.launched`.
    """

    several = 40  # tokens of answers that take long enough to run side by side
    endless = 900  # of an answer that takes far longer than a few clicks

    @pytest.fixture
    def context(self, browser: Any) -> Iterator[Any]:
        context = browser.new_context(viewport=WIDE)
        context.set_default_timeout(20_000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        yield context
        context.close()

    @pytest.fixture
    def page(self, context: Any, page_server: str) -> Any:
        """A tab with the page, its list of tasks there and none of them chosen."""
        page = context.new_page()
        page.seen = chromium.watched(page)
        opened(page, page_server)
        return page

    def test_loads_from_its_own_origin_without_a_complaint(self, page: Any, page_server: str) -> None:
        shown(page, "tasks", "3 / 3")
        shown(page, "state", "ready")
        assert page.seen.errors == []
        assert page.seen.origins == {page_server}

    def test_one_task_streams(self, page: Any) -> None:
        choose(page, "spam")
        ask(page, max_tokens=12)
        assert state(page, "spam", ENDED) == "done"
        assert text(page, "spam").strip()
        assert part(page, "spam", "tokens").inner_text() == "12"
        assert part(page, "spam", "finish").inner_text() == "length"
        assert re.fullmatch(r"[\d.]+ m?s", part(page, "spam", "first").inner_text())
        assert page.locator(".card").count() == 1
        assert page.seen.errors == []

    def test_three_tasks_stream_side_by_side(self, page: Any) -> None:
        """The page itself notes each growth, and who was still running then."""
        page.evaluate("""() => {
            window.growth = {};
            new MutationObserver((changes) => {
                const running = document.querySelectorAll('.answer[aria-busy="true"]').length;
                for (const { target } of changes) {
                    const card = (target.nodeType === 3 ? target.parentElement : target)?.closest('.card');
                    const length = card?.querySelector('.answer').textContent.length;
                    if (length && running === 3) (window.growth[card.dataset.task] ??= new Set()).add(length);
                }
            }).observe(document.getElementById('cards'), { subtree: true, characterData: true, childList: true });
        }""")
        choose(page, *TASKS)
        ask(page, max_tokens=self.several)
        assert {state(page, task, ENDED) for task in TASKS} == {"done"}
        grown = page.evaluate("Object.fromEntries(Object.entries(window.growth).map(([k, v]) => [k, v.size]))")
        assert len([task for task in TASKS if grown.get(task, 0) > 1]) >= 2, grown

    def test_stop_one_then_all(self, page: Any, page_server: str) -> None:
        """Of three answers the server must give up one, then the others: it may not write them for nobody."""
        before = stats(page, page_server)["tokens_generated"]
        choose(page, *TASKS)
        ask(page, max_tokens=self.endless)
        for task in TASKS:
            state(page, task, "streaming")
        assert page.locator("#send").is_disabled()
        part(page, "spam", "stop").click()
        assert state(page, "spam", ENDED) == "stopped"
        assert page.evaluate("document.activeElement.textContent") == "Again"  # the keyboard keeps its place
        runs(page, page_server, 2)
        assert part(page, "movie", "state").inner_text() == part(page, "news", "state").inner_text() == "streaming"
        page.click("#stop-all")
        assert state(page, "movie", ENDED) == state(page, "news", ENDED) == "stopped"
        left = [text(page, task) for task in TASKS]
        runs(page, page_server, 0)
        assert stats(page, page_server)["tokens_generated"] - before < 2 * self.endless
        assert [text(page, task) for task in TASKS] == left
        assert page.locator("#send").is_enabled()

    def test_a_page_that_is_left_ends_its_answer(self, page: Any, page_server: str) -> None:
        before = stats(page, page_server)["tokens_generated"]
        choose(page, "movie")
        ask(page, max_tokens=self.endless)
        state(page, "movie", "streaming")
        page.reload()
        page.wait_for_selector("#choices input")
        runs(page, page_server, 0)
        assert stats(page, page_server)["tokens_generated"] - before < self.endless

    def test_an_empty_prompt_is_not_sent(self, page: Any) -> None:
        choose(page, "movie")
        ask(page, "")
        assert page.evaluate("document.activeElement.id") == "prompt"
        assert page.locator(".card").count() == 0

    def test_the_prompt_is_text(self, page: Any) -> None:
        prompt = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
        choose(page, "movie")
        ask(page, prompt)
        state(page, "movie", ENDED)
        assert page.locator("#asked p").inner_text() == prompt
        assert page.locator("#results img, #results script").count() == 0
        assert page.title() == "alora playground"

    def test_says_when_the_server_is_gone_and_when_it_is_back(self, page: Any) -> None:
        shown(page, "state", "ready")
        page.context.set_offline(True)
        page.get_by_text("The server cannot be reached").wait_for()
        assert page.locator("#state").inner_text() == "offline"
        choose(page, "movie")
        ask(page)
        assert state(page, "movie", ENDED) == "error"
        page.context.set_offline(False)
        page.get_by_role("button", name="Try now").click()
        page.locator("#banner").wait_for(state="hidden")
        part(page, "movie", "again").click()
        part(page, "movie", "finish").filter(has_text="length").wait_for()
        assert state(page, "movie", ENDED) == "done"

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    @pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
    def test_looks(self, browser: Any, page_server: str, tmp_path: Path, size: dict[str, int], scheme: str) -> None:
        context = browser.new_context(viewport=size, color_scheme=scheme)
        page = context.new_page()
        opened(page, page_server)
        assert overflow(page) <= 0
        choose(page, *TASKS)
        ask(page, "a_word_without_an_end" * 20, max_tokens=12)
        for task in TASKS:
            state(page, task, ENDED)
        assert overflow(page) <= 0
        picture = tmp_path / f"{scheme}-{size['width']}.png"
        page.screenshot(path=picture)
        assert chromium.colours(picture) > 50
        light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(246, 247, 249)"
        assert light == (scheme == "light")
        context.close()

    def test_keyboard_alone(self, page: Any) -> None:
        """From the prompt on: back to the tasks with Shift+Tab, Space to choose, Ctrl+Enter to send."""
        page.focus("#none")
        for _ in range(5):
            page.keyboard.press("Shift+Tab")
            if page.evaluate("document.activeElement.type") == "checkbox":
                break
        page.keyboard.press("Space")
        page.focus("#prompt")
        page.keyboard.type("no mouse")
        page.keyboard.press("Control+Enter")
        state(page, "news", ENDED)  # the last in the list
        assert page.evaluate("document.activeElement.id") == "prompt"
        page.fill("#max-tokens", str(self.endless))
        page.keyboard.press("Enter")  # of a field with one line
        state(page, "news", "streaming")
        page.keyboard.press("Escape")
        assert state(page, "news", ENDED) == "stopped"
        page.focus("#send")
        assert page.locator("#send").evaluate("button => getComputedStyle(button).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        state(page, "news", "streaming")
        assert page.evaluate("document.activeElement.id") == "stop-all"  # Send cannot be pressed now
        page.keyboard.press("Enter")
        assert state(page, "news", ENDED) == "stopped"
        assert page.evaluate("document.activeElement.id") == "send"

    def test_the_address_gives_the_same_form_again(self, page: Any, page_server: str) -> None:
        """Twice: in a new tab, and pasted into a tab that shows the page; no part of it goes to the server."""
        prompt = 'a & b = 100 % #1 + "ü" 🙂\nsecond line'
        fields = {"#prompt": prompt, "#max-tokens": "9", "#temperature": "0.5", "#stop": "END\n\\n"}
        choose(page, "movie", "news")
        page.get_by_role("checkbox", name="Ask each as in its training").uncheck()
        for field, value in fields.items():
            page.fill(field, value)
        link = address(page, "stop=")
        other = page.context.new_page()
        asked: list[str] = []
        other.on("request", lambda request: asked.append(request.url))
        opened_as_it_is(other, link)
        assert [one for one in asked if "prompt" in one.partition("#")[0]] == []
        opened(page, page_server + "/#task=")
        page.evaluate("link => location.assign(link)", link)
        for tab in (other, page):
            tab.locator('#choices input[value="news"]:checked').wait_for()
            assert {field: tab.input_value(field) for field in fields} == fields
            assert chosen(tab) == ["movie", "news"] and not tab.locator("#apply").is_checked()
        opened_as_it_is(other, page_server + "/#task=")
        assert chosen(other) == []

    def test_an_address_that_does_not_fit_is_told(self, page: Any, page_server: str) -> None:
        tab = page.context.new_page()
        opened_as_it_is(tab, page_server + "/#task=movie&task=gone&max_tokens=many&key=secret")
        said = tab.locator("#said").inner_text()
        assert "not served here" in said and said.endswith(": gone.") and chosen(tab) == ["movie"]
        assert "The link's max_tokens is no number." in said and "The link's key is not known." in said
        choose(tab, "spam")
        assert "secret" not in address(tab, "task=spam")
        tab.click("#send")
        assert tab.locator(".card").count() == 0

    def test_a_long_prompt_stays_out_of_the_address(self, page: Any) -> None:
        """A reload still has it; who gets the link is told what is missing."""
        prompt = "word " * 3000
        page.fill("#prompt", prompt)
        link = address(page, "left_out=15000")
        assert len(link) < 200
        page.reload()
        page.wait_for_selector("#choices input")
        assert page.input_value("#prompt") == prompt
        tab = page.context.new_page()
        opened_as_it_is(tab, link)
        tab.get_by_text("The link leaves out its prompt of 15000 characters: paste it.").wait_for()
        assert tab.input_value("#prompt") == ""

    def test_everything_has_a_name(self, page: Any) -> None:
        choose(page, "movie")
        ask(page, max_tokens=3)
        state(page, "movie", ENDED)
        nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, textarea')].filter((one) =>
            !one.closest('[hidden]') && !one.labels?.length && !one.ariaLabel && !one.textContent.trim()
        ).map((one) => one.outerHTML)""")
        assert nameless == []
        assert page.locator(".answer").get_attribute("aria-live") == "polite"
