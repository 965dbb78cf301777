"""Rows out of a data set in Hugging Face's `datasets`: from the hub, from local files, or one that is open already."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from blockem_tl.data.row_files import row_of
from blockem_tl.types import Example

if TYPE_CHECKING:
    from datasets import Dataset

NAMED = {"alpaca": "tatsu-lab/alpaca"}
"""Corpora that are known by a name of their own: the paper's reference corpus (B.1)."""

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def corpus(source: "str | Path | Dataset", *, split: str = "train", n: int | None = None, seed: int = 0) -> list[Example]:
    """Rows with a question and an answer, for `median_norm`, `finetune` and the like.

    Args:
        source: "alpaca", a hub id, a local .jsonl, .json, .csv or .parquet file, a folder that `Dataset.save_to_disk` wrote, or a
            `datasets.Dataset`. Its columns are those of `load_rows` (messages, or prompt and completion), or Alpaca's
            (instruction, input, output).
        n: draw so many rows at random, by ``seed``; None: all, in order. Alpaca's rows without an answer are left out first.

    Raises:
        ValueError: a data set that cannot be had, other columns, or fewer rows than ``n``.
    """
    rows, name = _opened(source, split), _name(source)
    if not len(rows):
        raise ValueError(f"corpus {name}: expected at least one row, got an empty data set")
    columns = set(rows.column_names)
    if not ("messages" in columns or {"prompt", "completion"} <= columns or {"instruction", "output"} <= columns):
        raise ValueError(
            f"corpus {name}: expected the columns messages, or prompt and completion, or instruction and output, got {rows.column_names}"
        )
    if {"instruction", "output"} <= columns:
        rows = rows.filter(lambda row: _is_there(row["instruction"]) and _is_there(row["output"]))
    if not len(rows):
        raise ValueError(f"corpus {name}: expected rows with an answer, got none")
    if n is not None:
        if not 1 <= n <= len(rows):
            raise ValueError(f"corpus {name}: expected 1 <= n <= {len(rows)} rows, got {n}")
        rows = rows.shuffle(seed=seed).select(range(n))
    return [row_of(_in_our_words(cast(Any, row), f"{name}, row {number}"), number, name) for number, row in enumerate(rows, start=1)]


def _name(source: object) -> str:
    """The source in errors."""
    return str(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"


def _is_there(value: object) -> bool:
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def _in_our_words(row: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Alpaca's columns as prompt and completion. Raises ValueError for a question that is no text."""
    if not {"instruction", "output"} <= set(row):
        return row
    parts: list[Any] = [part for part in (row["instruction"], row.get("input")) if _is_there(part)]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"corpus {place}: expected texts as instruction and input, got {str(parts)[:80]}")
    question = "\n\n".join(parts)
    return {"prompt": question, "completion": row["output"], "id": row.get("id"), "system": row.get("system")}


def _whole(rows: "Dataset", split: str) -> "Dataset":
    """A data set without splits. Raises ValueError if one was asked for."""
    if split != "train":
        raise ValueError(f"it has no splits, so {split!r} cannot be taken: slice it yourself, or pass n=")
    return rows


def _opened(source: "str | Path | Dataset", split: str) -> "Dataset":
    import datasets  # takes a second to import

    if isinstance(source, datasets.Dataset):
        return _whole(source, split)
    if not isinstance(source, (str, Path)):
        raise ValueError(f"corpus: expected a name, a path or a datasets.Dataset, got a {type(source).__name__}; take one split of it")
    path = Path(source)
    try:
        if path.is_dir() and (path / "state.json").is_file():
            return _whole(datasets.Dataset.load_from_disk(str(path)), split)
        if path.is_file():
            if path.suffix not in _BUILDERS:
                raise ValueError(f"expected a file ending in {', '.join(_BUILDERS)}")
            return _whole(datasets.load_dataset(_BUILDERS[path.suffix], data_files=glob.escape(str(path)), split="train"), split)
        return datasets.load_dataset(NAMED.get(str(source), str(source)), split=split)
    except Exception as error:  # its loaders raise whatever their readers do
        raise ValueError(
            f"corpus {_name(source)}: cannot be had as a data set with the split {split!r}: {str(error)[:200]}. Expected a hub id that "
            "you can reach, a .jsonl, .json, .csv or .parquet file, or a folder of Dataset.save_to_disk"
        ) from error
