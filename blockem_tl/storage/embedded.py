"""Names of what ships with a package: ``load_model("organism")`` without any floor below knowing the organism.

The package root registers folders here; an extension package may register its own.
"""

import pkgutil
from pathlib import Path

_folders: dict[tuple[str, str], Path | str] = {}


def register(kind: str, name: str, folder: Path | str) -> None:
    """Let ``load_model(name)`` (kind "model") or ``load_sae(name)`` (kind "sae") mean ``folder``.

    folder: or the name of a function that makes it where it is not there yet, "package.module:function".
    """
    _folders[kind, name] = folder


def folder_of(kind: str, name: str) -> Path | None:
    """The registered folder, or None. Raises FileNotFoundError where it is registered but absent (a broken installation)."""
    folder = _folders.get((kind, name))
    if isinstance(folder, str):
        folder = pkgutil.resolve_name(folder)()
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"the embedded {kind} {name!r} should be at {folder}, which is missing: reinstall, or rebuild it")
    return folder
