"""`fetch`: public files in the user's cache, whole and checked, or not there at all."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pooch
import requests
import yaml

from blockem_tl.storage import files


@dataclass(frozen=True, kw_only=True)
class Source:
    """A public file: its address, its description, and its SHA-256 if that is known beforehand."""

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
    """The catalogue's entry. Raises ValueError with the names that there are if there is none."""
    if name not in catalogue():
        raise ValueError(f"unknown data {name!r}: expected one of {', '.join(catalogue())}")
    return catalogue()[name]


def cache_folder() -> Path:
    """The folder for public files: $BLOCKEM_DATA, or blockem_tl/ in the user's cache."""
    chosen = os.environ.get("BLOCKEM_DATA")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockem_tl"


def fetch(source: Source, folder: Path | None = None) -> Path:
    """The file's place in the cache, downloaded if it is not there yet, and checked every time.

    The checksum is the catalogue's, or else the one that was first seen and is kept in ``lock.json`` beside the files.

    Raises:
        ValueError: the file cannot be downloaded, or its contents do not have the checksum. No part of it is left in the cache.
    """
    folder = files.check_writable(folder or cache_folder())
    lock = folder / "lock.json"
    known: Any = files.read_json(lock) if lock.exists() else {}
    if not isinstance(known, dict) or not all(isinstance(entry, dict) for entry in known.values()):
        raise ValueError(f"{lock}: expected checksums by address, got something else: restore it, or delete it to trust what is downloaded")
    expected = source.sha256 or known.get(source.url, {}).get("sha256")
    target = folder / source.name / source.url.rsplit("/", 1)[-1]
    if not target.exists():
        _download(source.url, target, expected)
    found = pooch.file_hash(target)
    if expected not in (None, found):
        raise ValueError(
            f"the cached file {target}: expected SHA-256 {expected}, got {found}: delete it and fetch it again, or find out who changed it"
        )
    entry = {"name": source.name, "sha256": found, "bytes": target.stat().st_size}
    if known.get(source.url) != entry:
        files.write_json(lock, {**known, source.url: entry})
    return target


def _download(url: str, target: Path, expected: str | None) -> None:
    """Put the file at ``target``, whole and with the SHA-256 that is expected. Raises ValueError, and leaves nothing, if that fails."""
    if not _is_secure(url):
        raise ValueError(f"{url}: expected an address that begins with https://: what comes over another way may be altered on it")
    logger = pooch.get_logger()
    before, logger.disabled = logger.disabled, True
    target.parent.mkdir(parents=True, exist_ok=True)
    getter: Any = pooch.HTTPDownloader(hooks={"response": _check_secure})
    try:
        pooch.retrieve(url, expected, fname=target.name, path=target.parent, downloader=getter)
    except requests.HTTPError as error:
        raise ValueError(f"{error}: was the file moved? Correct the address {url}") from error
    except requests.exceptions.ChunkedEncodingError as error:
        raise ValueError(f"{url}: the download broke off ({error}): run it again") from error
    except _InsecureError as error:
        raise ValueError(f"{url}: {error}: nothing was kept; find an address that stays with https://") from error
    except requests.RequestException as error:
        raise ValueError(f"{url}: cannot be reached ({error}): is there a network? The file can also be put at {target} by hand") from error
    except ValueError as error:
        raise ValueError(f"{url}: the public file was replaced, or the download altered; do not use it unseen. {error}") from error
    finally:
        logger.disabled = before
        if not any(target.parent.iterdir()):
            target.parent.rmdir()


class _InsecureError(requests.RequestException):
    """A server sends us on to an address without TLS."""


def _is_secure(url: str) -> bool:
    """Whether it is https, or a server on this very machine."""
    address = urlsplit(url)
    return address.scheme == "https" or (address.scheme == "http" and address.hostname in ("127.0.0.1", "::1", "localhost"))


def _check_secure(response: requests.Response, **_: Any) -> None:
    """Refuse an answer, before its body is read, that did not come over https (requests follows redirects)."""
    if not _is_secure(response.url):
        raise _InsecureError(f"it leads to {response.url}, which is not https")
