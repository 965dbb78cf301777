"""Names of what ships with a package: ``load_model("organism")`` without any floor below knowing the organism.

The package root registers folders here; an extension package may register its own.
"""

from pathlib import Path

_folders: dict[tuple[str, str], Path] = {}


def register(kind: str, name: str, folder: Path) -> None:
    """Let ``load_model(name)`` (kind "model") or ``load_sae(name)`` (kind "sae") mean ``folder``."""
    _folders[kind, name] = folder


def folder_of(kind: str, name: str) -> Path | None:
    """The registered folder, or None. Raises FileNotFoundError where it is registered but absent (a broken installation)."""
    folder = _folders.get((kind, name))
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"the embedded {kind} {name!r} should be at {folder}, which is missing: reinstall, or rebuild it")
    return folder
