"""Tables for people: in a terminal, in a notebook, in Markdown. No torch here."""

import html as escaping
import io
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

MOST_ROWS, LONGEST_CELL = 30, 60
WIDTH = 140
"""Characters of a line where there is no terminal that says how many it has."""
_LEAST = 16  # a column is cut to no fewer characters than so many; where that does not do, the last columns are left out
_BESIDE = 3  # what a column takes besides its cells: two spaces and a rule


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


def text(frame: pd.DataFrame, *, rows: int = MOST_ROWS) -> str:
    """A data frame as a table of the terminal's width: at most so many rows, long cells cut, columns that do not fit named below it."""
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    shown, absent = _fitting(_shortened(frame, rows), width)
    console = Console(file=io.StringIO(), width=max(width, _BESIDE * shown.shape[1] + 1 + _LEAST))
    console.print(_table(shown))
    columns = f"... and the columns {', '.join(absent)}: see to_frame()" if absent else ""
    columns = textwrap.fill(columns, width) + "\n" * bool(absent)
    return str(console.file.getvalue()) + _left_out(frame, rows) + columns  # pyright: ignore[reportAttributeAccessIssue] - it is a StringIO


def html(frame: pd.DataFrame, *, caption: str = "", rows: int = MOST_ROWS) -> str:
    """A data frame as a table for a notebook: at most so many rows, long cells cut."""
    table = _shortened(frame, rows).to_html(index=False, border=0)
    return f"<div><p>{escaping.escape(caption)}</p>{table}<p>{_left_out(frame, rows)}</p></div>"


class RateFrame(pd.DataFrame):
    """A data frame that shows itself whole, a number and its interval (columns x, x_low, x_high) in one cell; else as any other.

    What is made from it (a selection, `round`) is pandas' own data frame again.
    """

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __repr__(self) -> str:
        return text(self.short()).rstrip("\n")

    def _repr_html_(self) -> str:
        return html(self.short())

    def short(self) -> pd.DataFrame:
        """The frame as it is shown: "0.05 [0.02, 0.12]" for x, x_low and x_high."""
        shown = pd.DataFrame(self)
        for name in self.columns:
            ends = [f"{name}_low", f"{name}_high"]
            if set(ends) <= set(self.columns):
                parts = zip(self[name], *(self[end] for end in ends), strict=True)
                cells = ["" if pd.isna(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in parts]
                shown = shown.drop(columns=ends).assign(**{str(name): cells})
        return shown


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


def _fitting(frame: pd.DataFrame, width: int) -> tuple[pd.DataFrame, list[str]]:
    """The columns that fit beside each other, the widest cut so that they do, and the names of those that do not."""
    natural = [max(map(cell_len, [str(name), *frame.iloc[:, i]])) for i, name in enumerate(frame.columns)]
    taken, n = 1, 0
    while n < len(natural) and (n == 0 or taken + min(natural[n], _LEAST) + _BESIDE <= width):
        taken += min(natural[n], _LEAST) + _BESIDE
        n += 1
    widths = natural[:n]
    while sum(widths) + _BESIDE * n + 1 > width and max(widths, default=0) > _LEAST:
        widths[widths.index(max(widths))] -= 1
    cut = {name: [_cut(cell, size) for cell in frame.iloc[:, i]] for i, (name, size) in enumerate(zip(frame.columns, widths, strict=False))}
    return pd.DataFrame(cut, columns=frame.columns[:n]), [str(name) for name in frame.columns[n:]]


def _cut(words: str, size: int) -> str:
    return words if cell_len(words) <= size else set_cell_size(words, size - 3) + "..."


def _shortened(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    return frame.head(rows).map(_cell)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return _cut(" ".join(str("" if value is None else value).split()), LONGEST_CELL)


def _left_out(frame: pd.DataFrame, rows: int) -> str:
    left = len(frame) - rows
    return f"... and {left} more rows: see to_frame()\n" if left > 0 else ""
