"""Every table on a page comes out again, to the last digit, from the data that lies under docs/results/."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from blockem_tl.storage import files
from blockem_tl.study.page import cells
from blockem_tl.types import Rate
from blockem_tl.views import tables

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
sys.path.insert(0, str(ROOT / "experiments"))

import compare_defences  # noqa: E402
import publish  # noqa: E402

Rows = list[dict[str, str]]


def frame(name: str) -> pd.DataFrame:
    """A published CSV, its lists as lists."""
    read = pd.read_csv(RESULTS / f"{name}.csv")
    for column in read.columns:
        if read[column].astype(str).str.startswith("[").any():
            read[column] = [ast.literal_eval(value) if isinstance(value, str) else value for value in read[column]]
    return read


def records(name: str) -> list[dict[str, Any]]:
    """Its rows, without what is absent in them."""
    return [{k: v for k, v in row.items() if isinstance(v, list) or not pd.isna(v)} for row in frame(name).to_dict("records")]


def each(row: Callable[[dict[str, Any]], dict[str, str]], name: str) -> Callable[[], Rows]:
    """A table of one row per row of the CSV."""
    return lambda: [row(one) for one in records(name)]


def quickstart() -> Rows:
    """The README's table, from the demo's summary."""
    summary = files.read_json(RESULTS / "quickstart" / "summary.json")
    shown = ("base", "sft", "blocked", "blocked_all_tokens", "random", "matched")
    return [quickstart_row(arm) for arm in [*(summary[name] for name in shown), *summary["kl_sweep"]]]


def quickstart_row(arm: dict[str, Any]) -> dict[str, str]:
    """One arm."""

    def rate(name: str) -> str:
        n = arm[f"{name}_n"]
        return str(Rate(k=round(arm[name] * n / 100), n=n))

    cells = {"EM, final prompts": "em", "incoherence": "incoherence", "finance adherence": "adherence"}
    return {"model": arm["label"]} | {title: rate(name) for title, name in cells.items()} | {"SFT loss": f"{arm['sft_loss']:.4f}"}


def seeds() -> Rows:
    """The table over seeds."""
    summaries = [files.read_json(path) for path in sorted((RESULTS / "quickstart" / "seeds").glob("*.json"))]
    return [row for summary in summaries for row in publish.seed_rows(summary)]


TABLES: dict[tuple[str, str], Callable[[], Rows]] = {
    ("README.md", "quickstart"): quickstart,
    ("docs/organism.md", "seeds"): seeds,
    ("docs/defences.md", "comparison"): each(compare_defences.table_row, "defences/arms"),
    ("docs/defences.md", "grid"): each(compare_defences.grid_row, "defences/grid"),
}


def on_page(page: str, marker: str) -> str:
    """What stands between the page's markers."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {marker}:begin -->")[1].split(f"<!-- {marker}:end -->")[0].strip()


def marked() -> list[tuple[str, str]]:
    """(page, marker) of every marked table."""
    return [
        (path.relative_to(ROOT).as_posix(), part.split(":begin -->")[0])
        for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for part in path.read_text(encoding="utf-8").split("<!-- ")[1:]
        if ":begin -->" in part.split("\n")[0]
    ]


def of_a_page(marker: str) -> bool:
    """Whether a `Page` published the table: "results/PAGE/NAME"."""
    return marker.startswith("results/")


@pytest.mark.parametrize(("page", "marker"), [one for one in marked() if of_a_page(one[1])])
def test_a_study_s_table_comes_out_again_from_its_data(page: str, marker: str) -> None:
    data = pd.read_csv(ROOT / "docs" / f"{marker}.csv")
    assert on_page(page, marker) == tables.markdown(cells(data)).strip()
    numbers = [name for name in data if data[name].dtype == float and name != "strength" and data[name].notna().any()]
    planted = {numbers[0]: data[numbers[0]] + 0.01} if numbers else {data.columns[-1]: "planted"}
    assert on_page(page, marker) != tables.markdown(cells(data.assign(**planted))).strip()  # it would be noticed


@pytest.mark.parametrize(("page", "marker"), TABLES, ids=[marker for _, marker in TABLES])
def test_a_table_comes_out_again_from_its_data(page: str, marker: str) -> None:
    assert on_page(page, marker) == tables.markdown(TABLES[page, marker]()).strip()


def test_no_marked_table_is_left_out() -> None:
    assert {one for one in marked() if not of_a_page(one[1])} == set(TABLES)


@pytest.mark.parametrize(
    ("folder", "page", "marker"), [("quickstart", "README.md", "quickstart"), ("defences", "docs/defences.md", "comparison")]
)
def test_the_table_beside_the_data_is_the_page_s(folder: str, page: str, marker: str) -> None:
    assert (RESULTS / folder / "table.md").read_text(encoding="utf-8").strip() == on_page(page, marker)


def test_another_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = records("defences/arms")
    changed[2]["em"] += 0.1
    shown = tables.markdown([compare_defences.table_row(row) for row in changed]).strip()
    assert shown != on_page("docs/defences.md", "comparison")
