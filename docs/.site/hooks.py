"""What the site has besides the files in docs/: the README and its like, the notebooks, and a page of names per room.

Pages are kept where they are read: README.md at the root, notebooks as notebooks, the public names in blockem_tl/__init__.pyi. So links are
written as they work in the repository (``docs/training.md`` in the README, ``../README.md`` in docs/), and are turned here.
"""

import fnmatch
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOR_TESTS = re.compile(r"^<!-- (?:setup\n.*?^|test: \w+ )-->\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?P<path>[\w./-]+)(?=[)#])")
OF_PANDAS = re.compile(r"<style.*?</style>| border=\"1\"| class=\"dataframe\"| style=\"[^\"]*\"", re.DOTALL)
WIDGET = "application/vnd.jupyter.widget-view+json"
BADGE = re.compile(r"\[!\[([^\]]*)\]\(https?:[^)]*\)\](?=\()")
BARE_BADGE = re.compile(r"!\[[^\]]*\]\(https?:[^)]*\) ?")
ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
IN_NUMBERS = re.compile(r"(?<=\(n) = (?=\d)|(?<=\d), (?=-?[\d.]+\])|(?<=\d) (?=[%\[])")
PUBLIC = re.compile(r"^from (\.[\w.]*) import (\w+)", re.MULTILINE)


# ------------------------------------------------------------------------------------------------ pages that are made


def rooms(table: str) -> dict[str, list[tuple[str, str]]]:
    """The public names by room, each with its full path, from the text of `__init__.pyi`; a comment begins a room."""
    found: dict[str, list[tuple[str, str]]] = {}
    for part in re.split(r"^# ", table, flags=re.MULTILINE)[1:]:
        title = part.splitlines()[0] if "." not in part.splitlines()[0] else "the organism"  # the first comment is about the table
        found[title] = [(name, f"blockem_tl{'' if module == '.' else module}.{name}") for module, name in PUBLIC.findall(part)]
    return {title: found[title] for title in [*list(found)[1:], *list(found)[:1]]}  # the organism last


def reference(title: str, names: list[tuple[str, str]]) -> str:
    """The page of a room."""
    intro = f"Everyday names: `from blockem_tl import {names[0][0]}`."
    return "\n\n".join([f"# {title[0].upper()}{title[1:]}", intro, *(f"::: {path}" for _, path in names)]) + "\n"


def notebook(path: Path) -> str:
    """A notebook as Markdown: its text, its code, and the text and figures that the code printed, if they were kept."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"~~~~python\n{source}\n~~~~")
        parts += [shown for output in cell.get("outputs", []) if (shown := output_of(output))]
    first, *rest = parts
    return "\n\n".join([first, f"This page is a notebook: [`{path.name}`]({path.name}).", *rest]) + "\n"


def output_of(output: dict[str, Any]) -> str:
    """One output of a cell: a figure, a table, or text; nothing for progress bars."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if output.get("name") == "stderr" or WIDGET in data:
        return ""
    data = {kind: "".join(text) for kind, text in data.items() if isinstance(text, (str, list))}
    if "image/png" in data:
        return f"![figure](data:image/png;base64,{data['image/png'].strip()})"
    html = data.get("text/html", "")
    if "<table" in html and "<script" not in html:
        return re.sub(r"\s*\n\s*", "", OF_PANDAS.sub("", html))
    text = data.get("text/plain", "").rstrip()
    return f"~~~~text\n{text}\n~~~~" if text else ""


def made_pages(docs: Path) -> dict[str, str]:
    """Path and text of every page that no file in docs/ holds."""
    pages = {target: (ROOT / name).read_text() for name, target in ROOT_PAGES.items()}
    for title, names in rooms((ROOT / "blockem_tl" / "__init__.pyi").read_text()).items():
        pages[f"reference/{'_'.join(re.findall(r'[a-z]+', title.lower()))}.md"] = reference(title, names)
    for path in sorted((docs / "tutorials").glob("*.ipynb")):
        pages[f"tutorials/{path.stem}.md"] = notebook(path)
    return pages


# ------------------------------------------------------------------------------------------------ navigation and links


def expanded(entry: Any, left: list[str]) -> list[Any]:
    """A part of the navigation with each glob replaced by the pages that it matches; these are taken out of those that are left."""
    if isinstance(entry, dict):
        return [{title: expanded(inner, left) if isinstance(inner, list) else inner for title, inner in entry.items()}]
    if isinstance(entry, list):
        return [one for part in entry for one in expanded(part, left)]
    if "*" not in entry:
        return [entry]
    matching = [path for path in left if fnmatch.fnmatch(path, entry)]
    left[:] = [path for path in left if path not in matching]
    return matching


def named_in(entry: Any) -> set[str]:
    """The pages that a part of the navigation names."""
    if isinstance(entry, str):
        return {entry}
    return set().union(*(named_in(part) for part in (entry if isinstance(entry, list) else entry.values())))


def turned(path: str, folder: str, page: str, pages: dict[str, str]) -> str:
    """A link as written in a file in ``folder`` of the repository, as it works on the page at ``page`` of the site."""
    there = posixpath.normpath(posixpath.join(folder, path))
    if there in ROOT_PAGES:
        there = f"docs/{ROOT_PAGES[there]}"
    as_page = there.removeprefix("docs/").replace(".ipynb", ".md")
    if there.endswith(".ipynb") and as_page in pages and as_page != page:  # a page of a notebook leads to its own file
        there = f"docs/{as_page}"
    return posixpath.relpath(there.removeprefix("docs/"), posixpath.dirname(page)) if there.startswith("docs/") else path


# ------------------------------------------------------------------------------------------------ what mkdocs calls


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages, and fill the navigation."""
    docs = Path(config.docs_dir)
    config.extra["made"] = made_pages(docs)
    known = [*config.extra["made"], *sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))]
    config.nav = expanded(config.nav, [path for path in known if path not in named_in(config.nav)])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, text in config.extra["made"].items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out what is for the tests, turn links that leave or enter docs/, make badges words, keep a table's numbers on one line."""
    here = page.file.src_uri
    folder = "" if here in ROOT_PAGES.values() else posixpath.join("docs", posixpath.dirname(here))
    text = BARE_BADGE.sub("", BADGE.sub(r"[\1]", FOR_TESTS.sub("", markdown)))
    text = LINK.sub(lambda link: turned(link["path"], folder, here, config.extra["made"]), text)
    return ROW.sub(lambda row: IN_NUMBERS.sub(lambda blank: blank[0].replace(" ", "\N{NO-BREAK SPACE}"), row[0]), text)
