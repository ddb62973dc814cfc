"""What mkdocs asks of us while it builds the site: links to files outside docs/, the API's pages, lines of warnings."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\(|src=\")(\.\./[^)#\"\s]+)")
API = re.compile(r"^<!-- api: (.+) -->$", re.MULTILINE)
NAMES = re.compile(r"^<!-- names: (.+) -->$", re.MULTILINE)
INCLUDE = re.compile(r"^<!-- include: (.+) -->$", re.MULTILINE)
BROKEN = re.compile(r"Doc file '(?P<page>[^']+)' contains an?(?: \w+)* link '(?P<link>[^']+)'")
SHIM = "https://unpkg.com/iframe-worker/shim"
log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any, **_: Any) -> Any:
    """Warnings of mkdocs about a link begin with its file and line."""
    folder = Path(config.docs_dir)

    def with_line(record: logging.LogRecord) -> bool:
        if found := BROKEN.match(message := record.getMessage()):
            line = line_of((folder / found["page"]).read_text(), found["link"])
            record.msg, record.args = f"docs/{found['page']}:{line}: {message}", ()
        return True

    logging.getLogger("mkdocs.structure.pages").filters[:] = [with_line]
    return config


def line_of(text: str, part: str) -> int:
    """The first line with that part, from 1; 1 where a hook wrote it."""
    return next((number for number, line in enumerate(text.splitlines(), 1) if part in line), 1)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Files of the repository that a page links to become files of the site, under `repository/`."""
    for page in list(files.documentation_pages()):
        for found in LINK.finditer(text := page.content_string):
            path, uri = target(page, found[2], config)
            place = f"docs/{page.src_uri}:{line_of(text, found[0])}"
            if uri is None or uri in files.src_uris:
                continue
            if path.is_file():
                files.append(File.generated(config, uri, abs_src_path=str(path)))
            else:
                why = "a folder, which a site cannot show: link a file" if path.is_dir() else "not in the repository"
                log.warning("%s: %s is %s", place, found[2], why)
    return files


def target(page: File, link: str, config: Any) -> tuple[Path, str | None]:
    """What a page links to, and where a file outside docs/ is in the site: what browsers would not show as text."""
    path, docs = (Path(page.abs_src_path or "").parent / link).resolve(), Path(config.docs_dir).resolve()
    if path.is_relative_to(docs):
        return path, None
    uri = f"repository/{path.relative_to(docs.parent).as_posix()}"
    return path, uri + ".txt" if path.suffix in (".md", ".yaml", ".py", ".sh") else uri


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A page with its links to other files moved, and what its comments ask for put in."""
    up = "../" * page.file.src_uri.count("/")

    def moved(found: re.Match[str]) -> str:
        _, uri = target(page.file, found[2], config)
        return found[0] if uri is None else found[1] + up + uri

    markdown = INCLUDE.sub(lambda found: included(found[1]), LINK.sub(moved, markdown))
    markdown = NAMES.sub(lambda found: names(found[1]), markdown)
    return API.sub(lambda found: api(*found[1].split()), markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Search from a disk without the network: the theme asks a server for what our script does."""
    return output.replace(SHIM, "../" * page.file.src_uri.count("/") + "offline_search.js")


def on_post_template(output_content: str, **_: Any) -> str:
    """The same for the page of what is not found."""
    return output_content.replace(SHIM, "offline_search.js")


def included(path: str) -> str:
    """A page of the repository's root, its links as they are from docs/."""
    return (ROOT / path).read_text().replace("](docs/", "](")


def api(module: str, *only: str) -> str:
    """A directive for each public name of a module, at the place that defines it."""
    room = import_module(module)
    parts = []
    for name in only or room.__all__:
        where = defined(room, name)
        parts.append(f"::: {where}\n    options:\n      heading: {module}.{name}\n      toc_label: {name}\n")
    return "\n".join(parts)


def names(module: str) -> str:
    """A table of a module's public names, the first line of each and where it is told in full."""
    room, lines = import_module(module), ["| name | |", "|---|---|"]
    for name in room.__all__:
        said = (inspect.getdoc(getattr(room, name)) or "").partition("\n")[0]
        lines.append(f"| [`{name}`][{defined(room, name)}] | {said} |")
    return "\n".join(lines)


def defined(room: ModuleType, name: str) -> str:
    """The full path of what a module gives out under a name, which may have been imported or come late."""
    thing = getattr(room, name)
    if isinstance(thing, ModuleType):
        return thing.__name__
    if hasattr(thing, "__qualname__"):
        return f"{thing.__module__}.{thing.__qualname__}"
    modules = [found for path, found in sorted(sys.modules.items()) if path.startswith(room.__name__)]
    homes = [m for m in modules if m.__dict__.get(name) is thing and m.__file__ and assigns(Path(m.__file__), name)]
    return f"{homes[0].__name__}.{name}"


def assigns(path: Path, name: str) -> bool:
    """Whether a file gives a name its value."""
    return re.search(rf"^{name}\b.*=", path.read_text(), re.MULTILINE) is not None
