"""The site builds offline without a warning, its links lead somewhere, and every name that is public or shown is on it."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_docs import PAGES, parts

ROOT = Path(__file__).parents[1]
SOURCES = (".mkdocs.yml", "docs", "blockem_tl", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
BUILD = """
import socket, sys
def refuse(*args): raise OSError("the site is built without a network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` does, in a process whose sockets refuse."""
    command = [sys.executable, "-c", BUILD, "build", "--strict", "--config-file", str(root / ".mkdocs.yml"), "--site-dir", str(out)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, env=os.environ)


class Collected(HTMLParser):
    """The anchors of a page, where its links lead, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.links += [found[name] for name in ("href", "src") if name in found]
        if tag in ("script", "img", "iframe") and "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "preconnect", "preload"):
            self.loads.append(found["href"])


def collected(site: Path) -> dict[Path, Collected]:
    pages = (path for path in sorted(site.rglob("*.html")) if path.name != "404.html")  # which is served at any address
    return {path: Collected(path) for path in pages}


def dead_links(site: Path) -> list[str]:
    """Links between the site's pages, and to its files, that lead nowhere. Links to other sites are not followed."""
    pages, dead = collected(site), []
    for path, page in pages.items():
        for link in page.links:
            target = urlsplit(link)
            if target.scheme or target.netloc or link.startswith("#__"):
                continue
            there = (path.parent / unquote(target.path)).resolve() if target.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or (target.fragment and there in pages and unquote(target.fragment) not in pages[there].anchors):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return out


@pytest.mark.slow
def test_the_site_has_no_dead_links_and_loads_nothing_from_elsewhere(site: Path) -> None:
    assert dead_links(site) == []
    pages = collected(site)
    assert len(pages) > 40
    assert [load for page in pages.values() for load in page.loads if urlsplit(load).netloc] == []


@pytest.mark.slow
def test_every_public_name_is_on_a_page(site: Path) -> None:
    anchors = set().union(*(page.anchors for page in collected(site).values()))
    table = re.findall(r"^from (\.[\w.]*) import (\w+)", (ROOT / "blockem_tl" / "__init__.pyi").read_text(), re.MULTILINE)
    assert len(table) > 80
    assert [name for module, name in table if f"blockem_tl{module.rstrip('.')}.{name}" not in anchors] == []


@pytest.mark.slow
def test_every_name_that_a_page_imports_is_explained(site: Path) -> None:
    anchors = set().union(*(page.anchors for page in collected(site).values()))
    shown = {name for code in shown_code() for name in imported(code)}
    assert len(shown) > 10
    assert [name for name in sorted(shown) if name not in anchors] == []


def shown_code() -> list[str]:
    """The code of all pages and notebooks, without what is hidden."""
    found = [code for page in PAGES for _, mark, code in parts(page) if mark != "setup"]
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        found += ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    return [code for code in found if not code.lstrip().startswith("%")]


def imported(code: str) -> set[str]:
    """Full paths of the names that code takes from a module of the library, and not from `blockem_tl` itself."""
    found = [
        node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blockem_tl.")
    ]
    homes = {"blockem_tl.hooks": {"patch", "record"}}
    return {f"{node.module}.{alias.name}" for node in found for alias in node.names if alias.name not in homes.get(node.module or "", ())}


# ------------------------------------------------------------------------------------------------ the twins


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "added", "said"),
    [
        ("docs/faq.md", "\n[gone](no_such_page.md) [gone too](training.md#no-such-heading)\n", ["no_such_page.md", "#no-such-heading"]),
        ("README.md", "\n[gone](docs/no_such_page.md)\n", ["no_such_page.md"]),
        ("docs/reference/further.md", "\n::: blockem_tl.hooks.no_such_name\n", ["no_such_name"]),
        ("docs/faq.md", "\n[`nothing`][blockem_tl.hooks.no_such_name]\n", ["no_such_name"]),
        (
            "blockem_tl/hooks.py",
            '\n\ndef planted(site: str) -> None:\n    """Words.\n\n    Args:\n        sitte: of another name.\n    """\n',
            ["sitte"],
        ),
    ],
)
def test_a_planted_fault_ends_the_build(tmp_path: Path, file: str, added: str, said: list[str]) -> None:
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("artefacts", "__pycache__"))
        else:
            shutil.copyfile(ROOT / name, tmp_path / name)
    with (tmp_path / file).open("a") as end:
        end.write(added)
    if file.endswith(".py"):
        with (tmp_path / "docs/reference/further.md").open("a") as end:
            end.write("\n::: blockem_tl.hooks.planted\n")
    done = build(tmp_path, tmp_path / "built")
    assert done.returncode != 0
    assert all(word in done.stderr for word in said), done.stderr


def test_a_dead_link_in_html_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a id="here" href="b.html#there">b</a> <a href="#here">a</a> <a href="https://x.org/y">x</a>')
    (tmp_path / "b.html").write_text('<h2 id="there"></h2><img src="figure.png"> <a href="a.html#gone">a</a> <a href="c.html">c</a>')
    assert dead_links(tmp_path) == ["b.html: figure.png", "b.html: a.html#gone", "b.html: c.html"]


# ------------------------------------------------------------------------------------------------ what pages name

NAMED_TEST = re.compile(r"\b(tests/[\w/]+\.py)(?:::(\w+))?")


def missing_tests(text: str) -> list[str]:
    """The tests that a page names and that are not there."""
    files = {file: (ROOT / file).read_text() if (ROOT / file).exists() else None for file, _ in NAMED_TEST.findall(text)}
    return [f"{file}::{name}" for file, name in NAMED_TEST.findall(text) if files[file] is None or f"def {name}" not in files[file]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tests_that_a_page_names_are_there(page: Path) -> None:
    assert missing_tests(page.read_text()) == []


def test_a_test_that_is_gone_is_noticed() -> None:
    assert missing_tests("`tests/test_site.py::test_a_test_that_is_gone_is_noticed`, `tests/test_site.py`") == []
    assert missing_tests("`tests/test_site.py::test_no_such`, `tests/no_such.py`") == [
        "tests/test_site.py::test_no_such",
        "tests/no_such.py::",
    ]
