"""The store: every value exactly once, whole, whatever kills a process; and no file that is something else is touched."""

import multiprocessing
import sqlite3
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from blockem_tl.storage.store import Store


def test_values_are_kept_and_the_first_one_stays(tmp_path) -> None:
    store = Store(tmp_path / "deep" / "s.sqlite")
    store.put({"a": {"reply": "w", "ids": [1, 2]}, "b": None})
    store.put({"a": "later"})
    assert store.get(["a", "b", "c"]) == {"a": {"reply": "w", "ids": [1, 2]}, "b": None} and len(store) == 2
    store.replace({"a": "later"})
    assert dict(Store(tmp_path / "deep" / "s.sqlite")) == {"a": "later", "b": None}
    assert store.get(str(i) for i in range(2000)) == {} and repr(store).endswith("2 values)")


def test_a_batch_is_kept_whole_or_not_at_all(tmp_path) -> None:
    store = Store(tmp_path / "s.sqlite")
    with pytest.raises(TypeError):
        store.put({"a": 1, "b": object()})
    assert len(store) == 0
    store.put({"a": 1})
    assert store.get(["a", "b"]) == {"a": 1}


def test_a_file_that_is_something_else_or_of_another_version_is_refused_and_left(tmp_path) -> None:
    (tmp_path / "text").write_text("thesis " * 200)
    with pytest.raises(ValueError, match="text: expected a store.*not a database"):
        Store(tmp_path / "text")
    assert (tmp_path / "text").read_text().startswith("thesis")
    store = Store(tmp_path / "new")
    store.connection.execute("PRAGMA user_version=7")
    store.close()
    with pytest.raises(ValueError, match="expected a store in format 2, got format 7"):
        Store(tmp_path / "new")
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE mine (x)")
    other.close()
    with pytest.raises(ValueError, match="got format 0: another version of blockem_tl or another program"):
        Store(tmp_path / "other")


def test_a_damaged_store_is_refused(tmp_path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({str(i): "word " * 100 for i in range(400)})
    store.close()
    data = (tmp_path / "s.sqlite").read_bytes()
    (tmp_path / "s.sqlite").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="expected a store.*(damaged|malformed)"):
        Store(tmp_path / "s.sqlite")


def test_a_full_disk_is_called_one_and_loses_nothing(tmp_path) -> None:
    store = Store(tmp_path / "s.sqlite")
    store.put({"a": "kept"})
    (pages,) = store.connection.execute("PRAGMA page_count").fetchone()
    store.connection.execute(f"PRAGMA max_page_count={pages}")  # what SQLite meets on a full disk
    with pytest.raises(OSError, match="the disk is full.*make room and run the same again"):
        store.put({str(i): "word " * 1000 for i in range(50)})
    store.connection.execute("PRAGMA max_page_count=1000000")
    store.put({"b": "later"})
    assert dict(store) == {"a": "kept", "b": "later"}


def _meet(folder: Path, mark: int, barrier: Barrier) -> None:
    for i in range(20):  # the moment that matters is the one at which a new file is made
        barrier.wait(60)
        store = Store(folder / f"{i}.sqlite")
        store.put({f"own {mark}": mark, "shared": [mark, mark]})
        store.close()
    store = Store(folder / "long.sqlite")
    for i in range(150):
        store.put({f"own {mark} {i}": mark, f"shared {i}": [mark, mark]})


def test_processes_make_and_write_one_store_at_once(tmp_path) -> None:
    forked = multiprocessing.get_context("fork")  # a child that raises ends with status 1
    barrier = forked.Barrier(4)
    children = [forked.Process(target=_meet, args=(tmp_path, mark, barrier)) for mark in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0] * 4
    for i in range(20):
        store = Store(tmp_path / f"{i}.sqlite")
        assert len(store) == 5 and store.get(["shared"])["shared"] in [[mark, mark] for mark in range(4)]
    store = Store(tmp_path / "long.sqlite")
    assert len(store) == 750
    assert all(one == other for one, other in store.get([f"shared {i}" for i in range(150)]).values())
