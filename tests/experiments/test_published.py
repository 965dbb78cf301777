"""Every table on a page comes out again, to the last digit, from the data that lies under docs/results/."""

from pathlib import Path

import pandas as pd
import pytest

from blockem_tl.study.page import cells
from blockem_tl.views import tables

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(("page", "marker"), marked())
def test_a_table_comes_out_again_from_its_data(page: str, marker: str) -> None:
    data = pd.read_csv(ROOT / "docs" / f"{marker}.csv")
    assert on_page(page, marker) == tables.markdown(cells(data)).strip()
    numbers = [name for name in data if data[name].dtype == float and name != "strength" and data[name].notna().any()]
    planted = {numbers[0]: data[numbers[0]] + 0.01} if numbers else {data.columns[-1]: "planted"}
    assert on_page(page, marker) != tables.markdown(cells(data.assign(**planted))).strip()  # it would be noticed


def test_the_front_page_shows_what_the_demo_shows() -> None:
    assert ("README.md", "results/quickstart-organism/table") in marked()
