"""Public files into the user's cache: whole, checked, or not there at all."""

import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from blockem_tl.storage import files

_CHUNK = 1 << 20
_TIMEOUT = 60.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public file: its address, what it is, and its SHA-256 where it is known beforehand."""

    name: str
    url: str
    what: str = ""
    kind: str = "prompts"
    sha256: str | None = None


@cache
def catalogue() -> dict[str, Source]:
    """The files that can be fetched by name."""
    entries = yaml.safe_load((Path(__file__).parent / "catalogue.yaml").read_text(encoding="utf-8"))
    found: dict[str, Source] = {}
    for name, entry in entries.items():
        for each in entry.pop("each", [""]):
            filled = {key: value.replace("{each}", each) if isinstance(value, str) else value for key, value in entry.items()}
            key = name.replace("{each}", each.replace("_", "-"))
            found[key] = Source(name=key, **filled)
    return found


def find_source(name: str) -> Source:
    """The catalogue's entry. Raises ValueError listing the names where there is none."""
    if name not in catalogue():
        raise ValueError(f"unknown data {name!r}: expected one of {', '.join(catalogue())}")
    return catalogue()[name]


def cache_folder() -> Path:
    """$BLOCKEM_DATA, or blockem_tl/ in the user's cache."""
    chosen = os.environ.get("BLOCKEM_DATA")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockem_tl"


def fetch(source: Source, folder: Path | None = None) -> Path:
    """The file's place in the cache, downloaded if it is not there yet, and checked every time.

    The checksum is the catalogue's, or else the one that the first download wrote into ``lock.json`` beside the files.

    Raises:
        ValueError: a missing file, a broken-off download, or contents that do not have the checksum. Nothing is left in the cache then.
    """
    folder = files.check_writable(folder or cache_folder())
    lock = folder / "lock.json"
    known: dict[str, Any] = files.read_json(lock) if lock.exists() else {}
    expected = source.sha256 or known.get(source.url, {}).get("sha256")
    target = folder / source.name / source.url.rsplit("/", 1)[-1]
    if target.exists():
        return _checked(target, expected, f"the cached file {target}", "delete it and fetch it again, or find out who changed it")
    with _downloaded(source.url, target) as temporary:
        _checked(temporary, expected, source.url, "the public file was replaced, or the download altered; do not use it unseen")
        files.write_json(lock, {**known, source.url: {"name": source.name, "sha256": sha256(temporary), "bytes": temporary.stat().st_size}})
        temporary.replace(target)
    return target


def sha256(path: Path) -> str:
    """The file's SHA-256."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            found.update(block)
    return found.hexdigest()


def _checked(path: Path, expected: str | None, what: str, advice: str) -> Path:
    got = sha256(path)
    if expected is not None and got != expected:
        raise ValueError(f"{what}: expected SHA-256 {expected}, got {got}: {advice}")
    return path


@contextmanager
def _downloaded(url: str, target: Path) -> Iterator[Path]:
    """The whole file beside its target, for the time of the block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file, urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
            while block := answer.read(_CHUNK):
                file.write(block)
            promised = answer.headers.get("Content-Length")
        if promised is not None and int(promised) != temporary.stat().st_size:
            raise ValueError(f"{url}: expected {promised} bytes, got {temporary.stat().st_size}: the download broke off; run it again")
        yield temporary
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: the server says {error.code} {error.reason}: was the file moved? Correct the address") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ValueError(f"{url}: cannot be reached ({error}): is there a network? The file can also be put at {target} by hand") from error
    finally:
        temporary.unlink(missing_ok=True)
        if not any(target.parent.iterdir()):
            target.parent.rmdir()
