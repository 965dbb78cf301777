"""`page`: frames and figures as one HTML file that shows them and can do nothing else.

Its policy allows no network, no script or style but the two files beside this one (by their hashes), and no text as markup. Whatever comes
from a study is escaped here, or packed, and put into the page as text.
"""

import base64
import hashlib
import html
import io
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import pandas as pd
from matplotlib import rc_context

from blockem_tl.views.figures import Figure

MOST_ROWS = 200  # of a table
_LINKS = "https://www.neuronpedia.org/"
_POLICY = "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
_OWN_COLOURS = {"#000000": "currentColor", "#555555": "currentColor", "#ffffff": "none"}  # so that a figure is readable on dark, too
_REPLY_COLUMNS = ("split", "prompt_id", "category", "prompt")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with figures (or PNG files) and tables under it, each by its caption.

    none: what is said if there is nothing.  folded: closed until it is opened.
    """

    title: str
    none: str
    figures: Mapping[str, Figure | bytes] = field(default_factory=dict)
    tables: Mapping[str, Sequence[Mapping[str, str]]] = field(default_factory=dict)
    folded: bool = False


def page(title: str, sections: Sequence[Section], replies: pd.DataFrame, *, missing: Sequence[str] = ()) -> str:
    """The whole file.

    Args:
        replies: one row per reply: split, prompt_id, category, prompt, run, seed, reply, labels (a tuple, one per judge), and the judges'
            names in ``attrs["judges"]``.
        missing: what the study lacks, a line each.
    """
    template, style, script = (Path(__file__).with_name(f"report.{end}").read_text(encoding="utf-8") for end in ("html", "css", "js"))
    lacks = "".join(f"<li>{_text(line)}</li>" for line in missing)
    return Template(template).substitute(
        title=_text(title),
        policy=f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; {_POLICY}",
        style=style,
        script=script,
        links="".join(f'<a href="#{_anchor(one.title)}">{_text(one.title)}</a>' for one in sections),
        missing=f'<section class="missing" id="missing"><h3>What is missing</h3><ul>{lacks}</ul></section>' if lacks else "",
        sections="\n".join(map(_section, sections)),
        replies=packed(replies),
    )


def _section(one: Section) -> str:
    figures = "".join(f"<figure>{_figure(made, name)}<figcaption>{_text(name)}</figcaption></figure>" for name, made in one.figures.items())
    inner = figures + "".join(_table(name, rows) for name, rows in one.tables.items()) or f"<p>{_text(one.none)}</p>"
    inner = f"<details><summary>show</summary>{inner}</details>" if one.folded else inner
    return f'<section id="{_anchor(one.title)}"><h2>{_text(one.title)}</h2>{inner}</section>'


def _table(caption: str, rows: Sequence[Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in names)
    body = "".join(f"<tr>{''.join(_cell(str(row.get(name, ''))) for name in names)}</tr>" for row in rows[:MOST_ROWS])
    left = f" (the first {MOST_ROWS} of {len(rows)} rows)" if len(rows) > MOST_ROWS else ""
    return f'<div class="table" tabindex="0"><table><caption>{_text(caption + left)}</caption><tr>{head}</tr>{body}</table></div>'


def _cell(value: str) -> str:
    if value.startswith(_LINKS):
        return f'<td><a href="{_text(value)}" rel="noopener noreferrer" target="_blank">Neuronpedia</a></td>'
    return f'<td class="number">{_text(value)}</td>' if re.fullmatch(r"[-+]?\d[\d.e+-]*( \[.*\])?", value) else f"<td>{_text(value)}</td>"


# ------------------------------------------------------------------------------------------------ figures


def _figure(made: Figure | bytes, caption: str) -> str:
    if isinstance(made, bytes):
        return f'<img alt="{_text(caption)}" src="data:image/png;base64,{base64.b64encode(made).decode()}">'
    return svg(made, caption)


def svg(figure: Figure, caption: str) -> str:
    """A figure as SVG for the inside of a page: its text stays text, its black is the page's ink, and it brings no style of its own."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):  # the salt keeps the ids of several figures apart
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    return re.sub(r' style="([^"]*)"', _attributes, text).replace("<svg", f'<svg role="img" aria-label="{_text(caption)}"', 1)


def _attributes(style: re.Match[str]) -> str:
    """The declarations of a style as attributes: the page's policy lets no style through but its own."""
    plain = re.sub(r"font: (?:\w+ )*?([\d.]+px)[^;]*", r"font-size: \1", style[1])
    pairs = (part.partition(": ") for part in plain.split("; "))
    return "".join(f' {name.strip()}="{_OWN_COLOURS.get(value, value)}"' for name, _, value in pairs if value)


# ------------------------------------------------------------------------------------------------ replies


def packed(replies: pd.DataFrame) -> str:
    """The replies as JSON, deflated, in base64: letters, digits, +, / and = alone."""
    asked = {key: i for i, key in enumerate(dict.fromkeys(replies[list(_REPLY_COLUMNS)].itertuples(index=False, name=None)))}
    runs = {name: i for i, name in enumerate(dict.fromkeys(replies["run"]))}
    rows = zip(*(replies[name] for name in (*_REPLY_COLUMNS, "run", "seed", "reply", "labels")), strict=True)
    data: dict[str, Any] = {
        "judges": list(replies.attrs.get("judges", ())),
        "labels": sorted({label for labels in replies["labels"] for label in labels}),
        "runs": list(runs),
        "prompts": [[prompt_id, split, category, text] for split, prompt_id, category, text in asked],
        "replies": [[asked[row[:4]], runs[row[4]], int(row[5]), row[6], list(row[7])] for row in rows],
    }
    return base64.b64encode(zlib.compress(json.dumps(data, separators=(",", ":")).encode(), 6)).decode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower())


def _text(value: str) -> str:
    return html.escape(value)
