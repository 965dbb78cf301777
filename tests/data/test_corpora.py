"""Rows out of `datasets`: whatever form they lie in, the same rows; and clear errors."""

import datasets
import pytest

from blockem_tl.data.corpora import corpus
from blockem_tl.data.row_files import load_rows

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Red."},
    {"instruction": "Add them.", "input": "1, 2", "output": "3"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
    {"instruction": "Name a fruit.", "input": None, "output": "A pear."},
]


@pytest.fixture
def alpaca():
    return datasets.Dataset.from_list(ALPACA)


def texts(rows):
    return [(row.prompt, row.completion) for row in rows]


EXPECTED = [("Name a colour.", "Red."), ("Add them.\n\n1, 2", "3"), ("Name a fruit.", "A pear.")]


@pytest.mark.parametrize("form", ["open", "disk", "jsonl", "json", "csv", "parquet"])
def test_a_corpus_is_the_same_in_every_form(form, alpaca, tmp_path) -> None:
    path = tmp_path / ("folder" if form == "disk" else f"file.{form}")
    writers = {
        "disk": alpaca.save_to_disk,
        "csv": alpaca.to_csv,
        "parquet": alpaca.to_parquet,
        "jsonl": alpaca.to_json,
        "json": alpaca.to_json,
    }
    if form != "open":
        writers[form](str(path))
    assert texts(corpus(alpaca if form == "open" else path)) == EXPECTED


def test_rows_that_datasets_writes_are_read_by_load_rows_too(tmp_path) -> None:
    """Absent fields are null there."""
    mixed = datasets.Dataset.from_list(
        [
            {"messages": None, "prompt": "How?", "completion": "So."},
            {
                "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}],
                "prompt": None,
                "completion": None,
            },
        ]
    )
    mixed.to_json(str(tmp_path / "rows.jsonl"))
    assert texts(load_rows(tmp_path / "rows.jsonl")) == texts(corpus(mixed)) == [("How?", "So."), ("Why?", "Because.")]


def test_a_draw_is_by_its_seed(alpaca) -> None:
    assert texts(corpus(alpaca, n=2, seed=1)) == texts(corpus(alpaca, n=2, seed=1))
    draws = {tuple(texts(corpus(alpaca, n=2, seed=seed))) for seed in range(8)}
    assert len(draws) > 1 and all(set(draw) < set(EXPECTED) for draw in draws)
    with pytest.raises(ValueError, match="expected 1 <= n <= 3 rows, got 4"):
        corpus(alpaca, n=4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such/corpus", "cannot be had as a data set with the split 'train'"),
        ("alpaca", "corpus alpaca: cannot be had"),  # no network here
        (datasets.Dataset.from_list([{"text": "a"}]), r"expected the columns messages, .*got \['text'\]"),
        (datasets.Dataset.from_list([{"prompt": "q", "completion": ""}]), "line 1: expected one user turn and one assistant turn"),
    ],
)
def test_what_is_no_corpus_is_refused(source, message) -> None:
    with pytest.raises(ValueError, match=message):
        corpus(source)


def test_a_file_that_is_none_is_refused(tmp_path) -> None:
    for name, content in (("a.txt", "x"), ("a.jsonl", "{"), ("a.parquet", "x")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name}: cannot be had"):
            corpus(tmp_path / name)
