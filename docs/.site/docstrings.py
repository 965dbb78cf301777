"""How the docstrings of the library are read: Google's sections, in the library's own shorthand.

The shorthand says several things on a line, with two blanks between them (``kind: of activation.  d_sae: latents.``), names arguments
together (``latent_set, sae: the one target``), and lists a class's fields as plain lines. Here each gets an entry of its own, so that the
site shows tables with types, and an argument that no signature has is a warning. Names in single backticks become links.
"""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from griffe import Extension, Object

ROOT = Path(__file__).parents[2]
NAMES = r"(?=(?P<names>[a-zA-Z_]\w*(?:, [a-zA-Z_]\w*)*): )"
IN_LINE, ON_LINES = re.compile(rf"(?:^|  ){NAMES}"), re.compile(rf"(?:^|\n|  ){NAMES}")
SECTION = re.compile(r"^(?P<title>Args|Raises|Attributes):\n(?P<body>(?:    .*\n?|\n)+)", re.MULTILINE)
BLOCK = re.compile(r"::\n\n(?P<code>(?:    .*(?:\n|$)|\n)+)")
CODE = re.compile(r"(```.*?```|`+[^`]+`+)", re.DOTALL)
NAME = re.compile(r"`(?P<name>[A-Za-z_][\w.]*)`")


def items(text: str, begin: re.Pattern[str], accepted: Callable[[str], bool]) -> list[tuple[str, str]]:
    """(name, what is said of it) for everything in ``text`` that begins as an entry, with accepted names; before it: ("", text)."""
    starts = [match for match in begin.finditer(text) if all(accepted(name) for name in match["names"].split(", "))]
    if not starts:
        return [("", text)]
    found = [("", text[: starts[0].start()])]
    for start, end in zip(starts, [*(match.start() for match in starts[1:]), len(text)], strict=True):
        said = text[start.end() : end].partition(": ")[2].strip()
        found += [(name, said) for name in start["names"].split(", ")]
    return found if found[0][1].strip() else found[1:]


def entries(found: list[tuple[str, str]]) -> str:
    """A section's body: an entry on a line of its own, its further lines below it."""
    return "".join(textwrap.indent(f"{name}: {said}" if name else said, "        ")[4:] + "\n" for name, said in found)


def sections(text: str) -> str:
    """Every section with one entry per name."""

    def spelled(match: re.Match[str]) -> str:
        body = textwrap.dedent(match["body"])
        lines = [line for line in re.split(r"\n(?! )", body) if line.strip()]
        found = [one for line in lines for one in items(re.sub(r"\n +", "\n", line), IN_LINE, lambda name: True)]
        return f"{match['title']}:\n{entries(found)}\n"

    return SECTION.sub(spelled, text)


def fields(text: str, obj: Object) -> str:
    """A class's docstring with its list of fields, which are plain paragraphs, as a section."""
    known = set(obj.members) | {name for base in obj.mro() for name in base.members} if obj.is_class else set()
    kept, listed = [], []
    for paragraph in text.split("\n\n"):
        found = items(paragraph, ON_LINES, known.__contains__)
        if found and found[0][0]:
            listed += found
        else:
            kept.append(paragraph)
    if not listed:
        return text
    where = next((i for i, paragraph in enumerate(kept) if SECTION.match(paragraph)), len(kept))
    return "\n\n".join([*kept[:where], f"Attributes:\n{entries(listed)}".rstrip(), *kept[where:]])


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """The text changed where it is no code."""
    return "".join(part if i % 2 else change(part) for i, part in enumerate(CODE.split(text)))


def linked(text: str, homes: dict[str, str]) -> str:
    """Names in backticks that have an entry on the site, as links to it."""

    def link(match: re.Match[str]) -> str:
        first, dot, rest = match["name"].partition(".")
        return f"[`{match['name']}`][{homes[first]}{dot}{rest}]" if first in homes else match[0]

    return "".join(NAME.sub(link, part) if i % 2 and not part.startswith("``") else part for i, part in enumerate(CODE.split(text)))


def homes() -> dict[str, str]:
    """Full paths of what the site has an entry for, by name."""
    table = (ROOT / "blockem_tl" / "__init__.pyi").read_text()
    found = {name: f"blockem_tl{module}.{name}" for module, name in re.findall(r"^from (\.[\w.]+) import (\w+)", table, re.MULTILINE)}
    further = re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "reference" / "further.md").read_text(), re.MULTILINE)
    return found | {path.rpartition(".")[2]: path for path in further}


class Shorthand(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_package(self, *, pkg: Object, **kwargs: Any) -> None:
        """Go through the package once it is read."""
        self._rewrite(pkg, homes())

    def _rewrite(self, obj: Object, known: dict[str, str]) -> None:
        if obj.docstring:
            code = BLOCK.sub(lambda match: f":\n\n```python\n{textwrap.dedent(match['code']).strip()}\n```\n", obj.docstring.value)
            text = outside_code(sections(fields(code, obj)), lambda part: part.replace("<", "&lt;"))
            obj.docstring.value = linked(text, known)
        for member in obj.members.values():
            if not member.is_alias:
                self._rewrite(member, known)
