"""`Page`: what an experiment shows: tables and figures in its folder, and, where they are published, the same in the documentation."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from blockem_tl.storage import files
from blockem_tl.views import tables

if TYPE_CHECKING:
    from blockem_tl.views.figures import Figure

_ENDINGS = ("csv", "md", "png")


class Page:
    """The tables and figures of one experiment.

    Args:
        out: the folder of NAME.csv, NAME.md and NAME.png.
        docs: the documentation's folder: everything is copied to docs/results/PAGE/, and each page there that has the markers
            ``<!-- results/PAGE/NAME:begin -->`` and ``<!-- results/PAGE/NAME:end -->`` gets the table between them. None: not published.
        name: PAGE; by default the name of ``out``.

    Raises:
        ValueError: a folder that cannot be written, or a ``docs`` that is none.
    """

    def __init__(self, out: str | Path, *, docs: str | Path | None = None, name: str | None = None) -> None:
        self.out, self.docs, self.name = files.check_writable(out), None if docs is None else Path(docs), name or Path(out).name
        if self.docs is not None and not self.docs.is_dir():
            raise ValueError(f"page {self.name!r}: expected the folder of the documentation as docs, got {self.docs}")

    def add(self, name: str, frame: pd.DataFrame, figure: "Figure | None" = None) -> str:
        """Write a table, and the figure of the same name, and print the table; its Markdown comes back."""
        shown = cells(frame)
        text = tables.markdown(shown)
        files.write_text(self.out / f"{name}.csv", pd.DataFrame(frame).to_csv(index=False))
        files.write_text(self.out / f"{name}.md", text)
        if figure is not None:
            from blockem_tl.views import plots  # matplotlib is slow to import

            plots.save(figure, self.out / f"{name}.png")
        print(f"{self.name}: {name}\n{tables.text(pd.DataFrame(shown))}")
        if self.docs is not None:
            self._publish(name, text)
        return text

    def _publish(self, name: str, text: str) -> None:
        assert self.docs is not None
        target = self.docs / "results" / self.name
        target.mkdir(parents=True, exist_ok=True)
        for ending in _ENDINGS:
            made = self.out / f"{name}.{ending}"
            if made.is_file():
                shutil.copyfile(made, target / made.name)
        marker = f"results/{self.name}/{name}"
        for page in [*self.docs.rglob("*.md"), self.docs.parent / "README.md"]:
            if page.is_file() and f"<!-- {marker}:begin -->" in (before := page.read_text(encoding="utf-8")):
                files.write_text(page, tables.between(before, marker, text))


def cells(frame: pd.DataFrame) -> list[dict[str, str]]:
    """A table's rows as people read them: rates in per cent with their intervals, losses with four digits. Missing cells are empty.

    x with x_low and x_high is "x %: 41.2 [30.1, 52.3]"; x_sem and x_change are per cent too. The CSV of `Page.add` gives the same cells.
    """
    names = [str(name) for name in frame.columns]
    ends = {end for name in names for end in (f"{name}_low", f"{name}_high") if {f"{name}_low", f"{name}_high"} <= set(names)}
    return [
        dict(_cell(name, row) for name in names if name not in ends)
        for row in ({str(key): value for key, value in row.items()} for row in pd.DataFrame(frame).to_dict("records"))
    ]


def _cell(name: str, row: dict[str, Any]) -> tuple[str, str]:
    value, title = row[name], name.replace("_", " ")
    is_rate = f"{name}_low" in row
    percent = is_rate or name.endswith(("_sem", "_change", "unparsed"))
    if value is None or (not isinstance(value, (list, tuple)) and pd.isna(value)):
        return (f"{title} %" if percent else title), ""
    if is_rate:
        return f"{title} %", f"{100 * value:.1f} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"
    if percent:
        return f"{title} %", f"{100 * value:+.1f}" if name.endswith("_change") else f"{100 * value:.1f}"
    if isinstance(value, float):
        return title, f"{value:.4f}" if name.endswith("loss") else f"{value:g}"
    return title, str(value)
