"""The page: complete in itself, readable as text, safe with names from strangers, quiet in a browser."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser

from alora_kernels.analysis.report import render, write_report

from ..serving import chromium
from ..support.adapters import lora
from ..support.refusals import refused
from . import adapters
from .adapters import UP, randn

EVIL = "<script>document.title='owned'</script>"
EVIL_FOLDER = "<img src=x onerror=alert(1)>&\"'"


def study_of(tmp_path, tasks=("math", EVIL), folder="adapter"):
    return adapters.study_of(tmp_path / folder, tasks, base=EVIL)


class Tags(HTMLParser):
    """Every tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_has_every_section_and_what_a_reader_needs(tmp_path):
    page = Tags(render(study_of(tmp_path, ("math", "code", "law")), command="alora analyze 'a b'"))
    heads = ["What was compared", "How to read this", "How alike", "How far, how large, of which rank", "Not compared"]
    assert all(head in page.text for head in [*heads, "Made with"])
    assert "math – code" in page.text and "alora analyze 'a b'" in page.text
    assert "one matrix: the units of this folder share it" in page.text
    assert re.search(r"subspace overlap of A \(chance 0\.250\)", page.text)
    assert "torch" in page.text and "3 units, 6 modules in 3 layers" in page.text


def test_names_from_strangers_are_text(tmp_path):
    study = study_of(tmp_path, folder=EVIL_FOLDER)
    write_report(study, tmp_path / "out", command=f"alora analyze {EVIL}")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Tags(text)
    assert EVIL in page.text and EVIL_FOLDER in page.text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert [a["alt"] for tag, a in page.tags if tag == "img" if EVIL in (a["alt"] or "")]


def test_the_report_is_one_file_and_figures_of_an_earlier_run_go(tmp_path):
    study = study_of(tmp_path, ("math", "code"))
    page = write_report(study, tmp_path / "out")
    names = {p.stem for p in (tmp_path / "out" / "figures").iterdir()}
    assert page.name == "report.html" and {"similarity", "norms-units"} <= names
    tags = Tags(page.read_text()).tags
    images = [a for tag, a in tags if tag == "img"]
    assert len(images) == len(names) and all(a["alt"] for a in images)
    linked = {a[key] for _, a in tags for key in ("src", "href", "srcset") if key in a}
    assert linked and all(link.startswith("data:") for link in linked)
    (tmp_path / "out" / "figures" / "mine.png").write_bytes(b"")
    write_report(study, tmp_path / "out", figures=False)
    assert [p.name for p in (tmp_path / "out" / "figures").iterdir()] == ["mine.png"]
    assert "<img" not in page.read_text()


def test_a_report_without_figures_needs_no_matplotlib(tmp_path, monkeypatch):
    study = study_of(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("pip install matplotlib.*--no-figures", write_report, study, tmp_path / "out", error=ImportError)
    assert not (tmp_path / "out").exists()
    assert write_report(study, tmp_path / "out", figures=False).exists()


def test_one_unit_and_nothing_left_out(tmp_path):
    only = lora(tmp_path / "only", {UP.format(0): randn(2, 8)}, {UP.format(0): randn(6, 2)})
    text = Tags(render(adapters.compared(only))).text
    assert "There is one unit" in text and "No pair could be compared" in text
    assert "Everything was compared with everything" in text


def test_many_pairs_are_cut_and_said(tmp_path):
    study = study_of(tmp_path, tuple(f"t{i}" for i in range(9)))
    text = Tags(render(study)).text
    assert "12 pairs between them are in similarity.csv" in text
    assert "t0, t1, t2, t3, t4, t5 and 3 more" in text


def test_a_browser_has_nothing_to_say_in_light_and_dark(tmp_path):
    page_file = write_report(study_of(tmp_path), tmp_path / "out", command="alora analyze x")
    with chromium.launched() as browser:
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
                seen = chromium.watched(page)
                page.goto(page_file.as_uri())
                assert page.title().startswith("Inside math")
                loaded = page.eval_on_selector_all("img", "all => all.map(i => i.complete && i.naturalWidth > 0)")
                assert loaded and all(loaded)
                assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
                dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 20, 26)"
                assert dark == (scheme == "dark")
                assert chromium.colours(page.screenshot()) > 50
                assert seen.errors == [] and seen.origins <= {"file://", "data://"}
                page.close()
