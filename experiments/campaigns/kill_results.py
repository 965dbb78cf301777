"""Two runs' results side by side: which files differ, which are half-written, and which finished parts were made again."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blockem_tl.storage.store import Store

VOLATILE = {"first_started", "wall_s", "peak_rss_mb"}
TIMES = re.compile(r"^.*\d s, peak memory.*$", re.MULTILINE)  # a line of the output
PARTS = {"run.json", "arm.json", "k.json", "latents.json", "training_state.safetensors"}
"""Files that are written when a part of the work is finished; tables of steps are others."""
BESIDE_A_STORE = (".sqlite-wal", ".sqlite-shm")  # SQLite's own: a store that was killed is whole only with them
Parts = Mapping[str, tuple[int, int]]


def _all(folder: Path) -> Iterator[Path]:
    """Files below a folder; os.walk passes over folders that vanish meanwhile."""
    return (Path(root) / name for root, _, names in os.walk(folder) for name in names)


def finished_parts(folder: Path) -> Parts:
    """(inode, time) of each finished part, by name."""
    found = [path for path in _all(folder) if path.name in PARTS or path.suffix == ".parquet"]
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def again(before: Parts, after: Parts) -> list[str]:
    """Finished parts that were made a second time."""
    return [name for name, stat in before.items() if after.get(name, stat) != stat]


def leftovers(folder: Path) -> list[str]:
    """Half-written files and folders, which are hidden; locks may stay."""
    hidden = {part for path in _all(folder) for part in path.relative_to(folder).parts if part.startswith(".") and part != ".lock"}
    empty = {Path(root).name for root, folders, names in os.walk(folder) if not folders and not names and Path(root) != folder}
    return [f"half-written: {name}" for name in sorted(hidden | {name for name in empty if name.startswith(".")})]


def differences(whole: Path, other: Path, said: str, said_there: str) -> list[str]:
    """The names of files that are not the same in both folders, and "the output" if that is not."""
    first, second = ({str(path.relative_to(folder)): path for path in _all(folder) if _counts(path, folder)} for folder in (whole, other))
    found = [f"missing: {name}" for name in sorted(first.keys() - second.keys())]
    found += [f"too much: {name}" for name in sorted(second.keys() - first.keys())]
    found += [f"differs: {name}" for name in sorted(first.keys() & second.keys()) if _contents(first[name]) != _contents(second[name])]
    return found + ["the output differs"] * (TIMES.sub("", said) != TIMES.sub("", said_there))


def _counts(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and not path.name.endswith(BESIDE_A_STORE)


def _contents(path: Path) -> Any:
    if path.suffix == ".sqlite":
        store = Store(path)
        try:
            return dict(store)
        finally:
            store.close()
    with suppress(ValueError):  # half of a JSON file
        if path.suffix == ".json":
            return _steady(json.loads(path.read_text()))
    return path.read_bytes()


def _steady(value: Any) -> Any:
    """JSON without what another run has otherwise."""
    if isinstance(value, dict):
        return {name: _steady(inner) for name, inner in value.items() if name not in VOLATILE}
    return [_steady(inner) for inner in value] if isinstance(value, list) else value
