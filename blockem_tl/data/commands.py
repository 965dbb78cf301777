"""The `blockem data` commands."""

# Heavy imports stand inside the commands: `--help` answers at once.
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro


def list_files() -> None:
    """List the public files that can be fetched."""
    from rich.console import Console

    from blockem_tl.data.public import catalogue

    console = Console(soft_wrap=True, highlight=False)
    for source in catalogue().values():
        console.print(f"[bold]{source.name}[/bold] ({source.kind}): {source.what}\n  {source.url}")


def fetch_file(name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")], /) -> None:
    """Download a public file into your cache, or check the copy that is there.

    Args:
        name: one of those that `blockem data list` shows.
    """
    from blockem_tl.data.public import fetch, find_source

    print(fetch(find_source(name)))


def overlap(files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")], /) -> None:
    """Show which prompts each two prompt files share; a prompt that selected anything must not report.

    Args:
        files: prompt files, two or more.
    """
    from blockem_tl.data.prompt_files import load_prompts
    from blockem_tl.data.splits import leak_report
    from blockem_tl.views.tables import show

    report = leak_report({path.stem: load_prompts(path) for path in files})
    if not report:
        raise ValueError("expected at least two prompt files")
    show([{**row, "ids": _few(row["ids"]), "inside": _few(row["inside"])} for row in report], "shared prompts")


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:8]) + ("" if len(ids) < 9 else f", ... ({len(ids)})")


def split(
    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")],
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")],
    /,
    *,
    member: str | None = None,
    password: str | None = None,
    train: int | None = None,
    heldout: int = 100,
    seed: int = 0,
) -> None:
    """Split fine-tuning rows into train.jsonl and heldout.jsonl, disjoint after normalising, with a report; before any training.

    Args:
        source: JSONL, or a zip with a member and a password.
        folder: a new folder for the three files.
        member: the file inside a zip that holds several.
        password: of the zip.
        train: how many rows train; all that are left by default.
        heldout: how many rows are held out.
        seed: of the draw.
    """
    from blockem_tl.data.row_files import load_rows, write_rows
    from blockem_tl.data.splits import split_rows
    from blockem_tl.storage import files
    from blockem_tl.views.tables import show

    found = split_rows(load_rows(source, member=member, password=password), train=train, heldout=heldout, seed=seed)
    with files.finished_folder(folder) as made:
        write_rows(made / "train.jsonl", found.train)
        write_rows(made / "heldout.jsonl", found.heldout)
        files.write_json(made / "report.json", found.report())
    show([found.report()], f"{folder}")


COMMANDS = {"list": list_files, "fetch": fetch_file, "overlap": overlap, "split": split}
