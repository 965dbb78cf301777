"""Files that are whole or absent: JSON written atomically, folders that appear only when finished, and what a run ran on."""

import errno
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_NUMBERS = re.compile(r"\[[\d\s.,eE+-]+\]")  # a list of numbers is easier to read on one line
_UNFINISHED = ".unfinished"
_PACKAGES = ("blockem-tl", "torch", "transformers", "transformer-lens", "sae-lens", "peft")


def write_json(path: Path | str, value: Any) -> Path:
    """Write ``value`` as readable JSON, in one step: a killed process leaves the old file or the new one, never half of one."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(path, _NUMBERS.sub(lambda found: " ".join(found.group().split()), text) + "\n")


def write_text(path: Path | str, text: str) -> Path:
    """Write a text file in one step, as `write_json` does."""
    return write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path | str, content: bytes) -> Path:
    """Write a file in one step, as `write_json` does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        temporary.write_bytes(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    return path


@contextmanager
def temporary_beside(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """A hidden file or folder beside ``path``, to be filled and then moved to it; what is not moved is removed.

    Those that killed processes left for the same ``path`` are removed first. They are known by a lock, which a maker holds while it lives;
    on file systems without locks they stay.
    """
    for abandoned in path.parent.glob(f".{escape(path.name)}.????????{_UNFINISHED}"):
        if (lock := _locked(abandoned, wait=False)) is not None:
            _remove(abandoned)
            os.close(lock)
    temporary, lock = _locked_temporary(path, folder)
    try:
        yield temporary
    except BaseException as error:
        _raise_if_full(error, path)
        raise
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _locked_temporary(path: Path, folder: bool) -> tuple[Path, int | None]:
    """A fresh temporary file or folder, and the handle of its lock."""
    names = {"dir": path.parent, "prefix": f".{path.name}.", "suffix": _UNFINISHED}
    while True:
        if folder:
            temporary = Path(tempfile.mkdtemp(**names))
        else:
            handle, name = tempfile.mkstemp(**names)
            os.close(handle)
            temporary = Path(name)
        lock = _locked(temporary, wait=True)
        if temporary.exists():  # else another process took it for an abandoned one, before it was locked
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _locked(path: Path, *, wait: bool) -> int | None:
    """The handle that holds the lock of a temporary file or folder until it is closed; None if it cannot be had."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return handle
    except OSError:
        os.close(handle)
        return None


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path | str) -> None:
    """Remove a folder in one step: a killed process leaves all of it, or nothing under its name."""
    path = Path(path)
    with temporary_beside(path, folder=True) as aside:
        os.replace(path, aside / path.name)


def _raise_if_full(error: BaseException, path: Path) -> None:
    """Raise one clear OSError for a disk that is full, whoever met it: safetensors says the system's number in its text."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) and error.errno else int(said[1]) if said else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        why = os.strerror(number)
        raise OSError(number, f"{why}: make room and run the same again; what was finished before is still there", str(path)) from error


def read_json(path: Path | str) -> Any:
    """Read JSON. Raises ValueError naming the file where it is not JSON (NaN and infinity are none), FileNotFoundError without one."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = parse_json(text)
        if "\\ud" in text.lower():  # half of a surrogate pair could not be written again
            json.dumps(found, ensure_ascii=False).encode()
        return found
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got something that stops making sense at line {error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ValueError(f"{path}: expected a file of JSON, got something else: {str(error)[:200]}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, NaN, infinity and numbers too large for a float among it."""
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number that JSON can hold")
    return value


@contextmanager
def finished_folder(path: Path | str, *, replaces: str | None = None) -> Iterator[Path]:
    """A folder to fill that takes the place of ``path`` only if the block ends well.

    Args:
        replaces: the name of a file by which an older result may be known; a folder that holds it (or nothing) is replaced.

    Raises:
        FileExistsError: ``path`` exists and may not be replaced.
    """
    path = Path(path)
    check_replaceable(path, replaces)
    check_writable(path.parent)
    with temporary_beside(path, folder=True) as temporary:
        yield temporary
        os.chmod(temporary, 0o755)
        if path.exists():
            remove_folder(path)
        os.replace(temporary, path)


@contextmanager
def held(path: Path | str) -> Iterator[None]:
    """Inside the block nobody else may write ``path``, a file or a folder that is there. A process that dies leaves it free.

    Raises:
        ValueError: another run holds it.
    """
    path = Path(path)
    mark = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    lock = FileLock(mark)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{path}: another run is writing it: wait until it has finished, or choose another place") from error
    except NotImplementedError:
        warnings.warn(f"{path} lies on a file system without locks: see to it yourself that one run at a time writes there", stacklevel=3)
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)  # while it is held: filelock does not accept a file that has lost its name
        lock.release()


def check_replaceable(path: Path | str, replaces: str | None) -> None:
    """Raise FileExistsError unless ``path`` is absent, an empty folder, or (with ``replaces``) a folder that holds that file."""
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if replaces is None:
        raise FileExistsError(f"{path} exists: choose another folder, or pass overwrite=True to replace it")
    if not (path / replaces).is_file():
        raise FileExistsError(f"{path} exists and holds no {replaces}, so it is something else: choose another folder")


def check_writable(folder: Path | str) -> Path:
    """Make ``folder`` and prove that a file can be written there, before long work. Raises ValueError where it cannot."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {folder}: {error.strerror}. Choose another folder or change its rights"
        ) from error
    return folder


def environment() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, in MB (10^6 bytes)."""
    try:
        import resource
    except ImportError:  # Windows has none, and keeps the peak elsewhere
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6  # pyright: ignore[reportAttributeAccessIssue]
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
