"""Text and JSON lines from files of other people: every fault is named with its file and line before anything is done with them."""

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from blockem_tl.storage import files

_MAGIC = {
    b"\x1f\x8b": "compressed with gzip: unpack it first (gunzip)",
    b"BZh": "compressed with bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ": "compressed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first (unzstd)",
    b"PK\x03\x04": "a zip archive: unpack it, or read rows from it with load_rows(... .zip, member=, password=)",
    b"PAR1": "Parquet: read it with datasets.load_dataset and write JSON lines (to_json)",
    b"age-encryption.org": "encrypted with age: decrypt it first",
    b"-----BEGIN PGP MESSAGE": "encrypted with PGP: decrypt it first",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml refuses deep nesting at once
_BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> str:
    """The file as UTF-8, with or without a byte order mark. Raises ValueError naming the line where the encoding is broken."""
    return "".join(_lines(path))


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank, read as they are asked for; see `json_lines`."""
    return json_lines(_lines(path), path)


def json_lines(lines: Iterable[str], where: Path | str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank.

    Raises:
        ValueError: naming file and line, for a line that is no JSON object or holds half of a surrogate pair.
    """
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _object(line, f"{where}, line {number}")


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        row = files.parse_json(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: half of a surrogate pair, which is no character, at {line[:80]!r}; repair the text") from error
    except (ValueError, RecursionError) as error:
        array = "; is it one pretty-printed array? Write one object per line" if line.lstrip()[:1] in "[]{}" else ""
        raise ValueError(f"{place}: expected a JSON object, got {line[:80]!r}{array}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: expected a JSON object, got a {type(row).__name__}")
    return row


def read_yaml(text: str, where: Path | str) -> Any:
    """The value of a YAML text. Raises ValueError naming the file for anything else, or for what would make other things than data."""
    try:
        return yaml.load(text, Loader=_SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{where}: expected YAML, got something else: {str(error)[:200]}") from error


def shown(value: object, length: int = 80) -> str:
    """A value in an error. YAML's aliases can make a few lines into a value that would take all memory when printed whole."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:length]


def present(row: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are there: `datasets` writes absent ones as null."""
    return {key: value for key, value in row.items() if value is not None}


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file in UTF-8, with their ends."""
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield _decoded(line if number > 1 else _without_mark(line, path), path, number)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def _without_mark(line: bytes, path: Path) -> bytes:
    """The first line without a byte order mark. Raises ValueError where the file is of another kind."""
    kind = next((kind for magic, kind in _MAGIC.items() if line.startswith(magic)), None)
    if kind:
        raise ValueError(f"{path}: expected text in UTF-8, got a file that is {kind}")
    return line.removeprefix(_BOM)


def _decoded(line: bytes, path: Path, number: int) -> str:
    if b"\x00" in line:
        raise ValueError(f"{path}, line {number}: expected text in UTF-8, got a NUL byte; is it UTF-16, or no text?")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: expected UTF-8, got the byte {line[error.start]:#04x}; save the file as UTF-8") from error


def text_of(row: Mapping[str, Any], names: Sequence[str], place: str) -> str:
    """The text under the first of ``names`` that is there. Raises ValueError where none is, or it is no text."""
    found = [name for name in names if name in row]
    if not found or not isinstance(row[found[0]], str):
        got = f"{found[0]} = {shown(row[found[0]], 60)!r}" if found else f"the keys {sorted(row)}"
        raise ValueError(f"{place}: expected a text under {' or '.join(names)}, got {got}")
    return row[found[0]]


def optional_text(row: Mapping[str, Any], name: str, place: str) -> str | None:
    """The text under ``name``, or None where there is none. Raises ValueError where it is something else."""
    return text_of(row, [name], place) if row.get(name) is not None else None


def id_of(row: Mapping[str, Any], default: object, place: str) -> str:
    """The row's id, a text or a whole number. Raises ValueError for anything else."""
    value = row.get("id", default)
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
        raise ValueError(f"{place}: expected a text or a whole number as id, got {shown(value, 60)!r}")
    return str(value)
