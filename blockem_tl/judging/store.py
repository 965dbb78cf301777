"""Verdicts on disk, each exactly once: what was graded before a crash, or before the endpoint went down, is never asked for again."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from blockem_tl.storage.store import insert_all, open_database

_SCHEMA = "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, judge TEXT, rubric TEXT, label TEXT, said TEXT, scores TEXT)"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One graded reply. ``said``: the judge's own words, all attempts; ``scores``: those of a "scores" rubric."""

    label: str
    said: tuple[str, ...] = ()
    scores: tuple[tuple[str, float], ...] = ()


def key_of(judge: str, rubric: str, question: str, reply: str) -> str:
    """Identity of one grading: who judges, by which rubric (its fingerprint), and what."""
    return hashlib.sha256("\x00".join((judge, rubric, question, reply)).encode("utf-8", "surrogatepass")).hexdigest()


class VerdictStore:
    """A SQLite file of `Judged` by key. Every ``put`` is on disk when it returns; several processes may share the file.

    Raises:
        ValueError: the file is no such store, damaged, or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.connection = open_database(path, _SCHEMA, what="verdict store")

    def get(self, keys: Iterable[str]) -> dict[str, Judged]:
        """The verdicts that are there, of those asked for."""
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            marks = ",".join("?" * len(part))
            for key, label, said, scores in self.connection.execute(
                f"SELECT key, label, said, scores FROM verdicts WHERE key IN ({marks})", part
            ):
                found[key] = Judged(label=label, said=tuple(json.loads(said)), scores=tuple((n, v) for n, v in json.loads(scores)))
        return found

    def put(self, key: str, judged: Judged, *, judge: str, rubric: str) -> None:
        """Keep a verdict; the first one stays where there is one already."""
        self.put_all({key: judged}, judge=judge, rubric=rubric)

    def put_all(self, verdicts: Mapping[str, Judged], *, judge: str, rubric: str) -> None:
        """Keep verdicts by key, all of them or none; the first one stays where there is one already."""
        rows = [
            (key, judge, rubric, judged.label, json.dumps(judged.said, ensure_ascii=False), json.dumps(judged.scores))
            for key, judged in verdicts.items()
        ]
        insert_all(self.connection, "INSERT OR IGNORE INTO verdicts VALUES (?, ?, ?, ?, ?, ?)", rows)

    def counts(self) -> Mapping[str, int]:
        """How many verdicts there are of each label."""
        return dict(self.connection.execute("SELECT label, COUNT(*) FROM verdicts GROUP BY label ORDER BY label"))

    def __iter__(self) -> Iterator[tuple[str, str, str, str]]:
        """(key, judge, rubric, label) of every verdict."""
        yield from self.connection.execute("SELECT key, judge, rubric, label FROM verdicts ORDER BY key")

    def close(self) -> None:
        """Close the file."""
        self.connection.close()
