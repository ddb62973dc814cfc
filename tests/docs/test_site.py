"""The site refuses broken links with file and line, asks nobody else for anything, and finds what people ask it."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import yaml
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import alora_kernels

from ..serving import chromium

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site"
LINK = re.compile(r"\]\((?!\w+:|#|<)([^)#\s]+)(#[^)\s]+)?\)")
ASKED = {  # what is typed into the search: the page and heading that answer it
    "how do I add a task": "troubleshooting.html#how-do-i-add-a-task",
    "why is my loss nan": "troubleshooting.html#my-loss-is-nan",
    "does it work with Qwen3-MoE": "troubleshooting.html#does-it-work-with-my-model",
    "how do I run it on two GPUs": "troubleshooting.html#how-do-i-run-it-on-two-gpus",
}


def built(folder: Path, **pages: str) -> Path:
    """A site of these pages, made as ours is but without the API."""
    for name, text in {"index": "# Home\n", **pages}.items():
        (folder / "docs").mkdir(exist_ok=True)
        (folder / "docs" / f"{name}.md").write_text(text)
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    settings |= {"docs_dir": "docs", "hooks": [str(ROOT / "docs" / "hooks.py")], "plugins": ["search", "offline"]}
    del settings["nav"], settings["extra_css"]
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    build(load_config(str(folder / "mkdocs.yml"), site_dir=str(folder / "site")))
    return folder / "site"


@pytest.mark.parametrize(
    "link", ["gone.md", "index.md#gone", "../gone.py", "../docs", "/index.md"], ids=lambda link: link
)
def test_a_broken_link_ends_the_build_with_its_line(tmp_path, monkeypatch, caplog, link):
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    with caplog.at_level(logging.WARNING), pytest.raises(Abort):
        built(tmp_path, page=f"# Page\n\nText, and\n[a link]({link}).\n")
    assert re.search(r"docs/page\.md:4: ", caplog.text), caplog.text


def test_links_of_the_readme_lead_somewhere():
    broken = []
    for number, line in enumerate((ROOT / "README.md").read_text().splitlines(), 1):
        for found in LINK.finditer(line):
            path = ROOT / found[1]
            if not path.exists():
                broken.append(f"README.md:{number}: {found[1]}")
            elif found[2] and found[2] not in anchors(path):
                broken.append(f"README.md:{number}: {found[1]}{found[2]}")
    assert not broken


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    from pymdownx.slugs import slugify

    slug = slugify(case="lower")
    return {"#" + slug(found, "-") for found in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)}


@pytest.fixture(scope="module")
def site() -> Path:
    if not (SITE / "index.html").exists():
        pytest.skip("no site: make docs")
    return SITE


def test_nothing_is_asked_of_others(site):
    outside = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^\"\s>]+")
    found = {page.name: outside.findall(page.read_text()) for page in site.rglob("*.html")}
    assert len(found) > 30 and not {name: links for name, links in found.items() if links}


def test_files_of_the_repository_come_with_it_and_pages_do_not(site):
    copies = {path.relative_to(site / "repository").as_posix() for path in (site / "repository").rglob("*.*")}
    assert {"bench/results/cpu.csv", "examples/train.yaml.txt"} <= copies
    assert not [copy for copy in copies if copy.startswith("docs/")]


def test_every_public_name_has_its_place(site):
    text = "".join(page.read_text() for page in (site / "api").glob("*.html"))
    for name in ("", "analysis", "data", "federated", "modules", "serving", "training", "tuner"):
        room = getattr(alora_kernels, name) if name else alora_kernels
        missing = [own for own in room.__all__ if not re.search(rf"id=\"[\w.]*\b{own}\"", text)]
        assert missing == [], room.__name__


def test_questions_find_their_answer_from_a_disk(site):
    with chromium.launched() as browser:
        page = browser.new_page()
        seen = chromium.watched(page)
        page.goto((site / "index.html").as_uri())
        for question, answer in ASKED.items():
            page.click(".md-search__input", click_count=3)
            page.keyboard.type(question)
            page.wait_for_selector(f".md-search-result__link[href*='{answer.split('#')[1]}']")
            found = [link.get_attribute("href") or "" for link in page.query_selector_all(".md-search-result__link")]
            places = [re.sub(r"\?[^#]*", "", href) for href in found[:4]]
            assert any(answer in place for place in places), (question, places)
        assert seen.origins == {"file://"} and not seen.errors
