"""Tables for people: in a terminal, in a notebook, in Markdown. No torch here."""

import html as escaping
import io
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

MOST_ROWS, LONGEST_CELL = 30, 60


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A GitHub table of the rows' columns, in the order of the first row; missing cells stay empty."""
    if not rows:
        raise ValueError("expected at least one row for a table, got none")
    frame = pd.DataFrame(rows).fillna("")
    header = "| " + " | ".join(frame.columns) + " |"
    rule = "|" + "|".join("---" if i == 0 else "---:" for i in range(len(frame.columns))) + "|"
    return "\n".join([header, rule, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in frame.itertuples(index=False))]) + "\n"


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print the rows as a table on screen."""
    Console().print(_table(pd.DataFrame(rows).astype(str), title))


def text(frame: pd.DataFrame) -> str:
    """A data frame as a table for a terminal: at most 30 rows, long cells cut."""
    console = Console(file=io.StringIO(), width=140)
    console.print(_table(_shortened(frame)))
    return str(console.file.getvalue()) + _left_out(frame)  # pyright: ignore[reportAttributeAccessIssue] - it is a StringIO


def html(frame: pd.DataFrame, *, caption: str = "") -> str:
    """A data frame as a table for a notebook: at most 30 rows, long cells cut."""
    return f"<div><p>{escaping.escape(caption)}</p>{_shortened(frame).to_html(index=False, border=0)}<p>{_left_out(frame)}</p></div>"


def between(text: str, marker: str, content: str) -> str:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->``. Raises ValueError where they are absent."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"expected the markers {begin} and {end} in the page, got neither or one of them")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content.rstrip()}\n{end}{rest.split(end, 1)[1]}"


def _table(frame: pd.DataFrame, title: str | None = None) -> Table:
    table = Table(title=title)
    for i, column in enumerate(frame.columns):
        table.add_column(str(column), justify="left" if i == 0 else "right", no_wrap=True)
    for row in frame.itertuples(index=False):
        table.add_row(*map(str, row))
    return table


def _shortened(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.head(MOST_ROWS).map(_cell)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    words = " ".join(str("" if value is None else value).split())
    return words if len(words) <= LONGEST_CELL else words[: LONGEST_CELL - 3] + "..."


def _left_out(frame: pd.DataFrame) -> str:
    left = len(frame) - MOST_ROWS
    return f"... and {left} more rows: see to_frame()\n" if left > 0 else ""
