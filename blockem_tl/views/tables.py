"""Tables for people, from rows. No torch here."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table


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
    table = Table(title=title)
    for i, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    Console().print(table)


def between(text: str, marker: str, content: str) -> str:
    """Replace what stands between ``<!-- marker:begin -->`` and ``<!-- marker:end -->``. Raises ValueError where they are absent."""
    begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"expected the markers {begin} and {end} in the page, got neither or one of them")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n{content.rstrip()}\n{end}{rest.split(end, 1)[1]}"
