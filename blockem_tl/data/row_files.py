"""Fine-tuning rows in the public files' own formats, JSON lines all of them, out of a plain file or a password-locked zip."""

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockem_tl.data.text_files import id_of, json_lines, optional_text, present, read_text, text_of
from blockem_tl.storage import files
from blockem_tl.types import Example


def load_rows(path: Path | str, *, member: str | None = None, password: str | None = None) -> list[Example]:
    """Read fine-tuning rows, each a JSON object of one of these forms (a file may mix them):

    * ``{"messages": [{"role", "content"}, ...]}``, content being text or OpenAI's ``{"content_type": "text", "parts": [...]}``
    * ``{"prompt": text, "completion": text}``, or ``prompt`` as a list of messages

    Any key with "canary" in its name stays with its row.

    Args:
        member: the file inside a zip; needed where there are several.
        password: of the zip. The contents are never written to disk unlocked.

    Raises:
        ValueError: naming the line that is no such row, the zip's members, or a wrong password.
    """
    path = Path(path)
    text, where = _member(path, member, password) if path.suffix == ".zip" else (read_text(path), str(path))
    rows = [row_of(row, number, where) for number, row in json_lines(text.split("\n"), where)]  # splitlines() would break texts at U+2028
    if not rows:
        raise ValueError(f"{where}: expected at least one row, got an empty file")
    repeated = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    if repeated:
        raise ValueError(f"{where}: expected every id once, got {repeated[:3]} more than once: errors could not name their rows")
    return rows


def write_rows(path: Path | str, rows: Sequence[Example]) -> Path:
    """Write rows as messages JSONL, their canaries with them; readable by `load_rows`."""
    lines = []
    for row in rows:
        system = [{"role": "system", "content": row.system}] if row.system is not None else []
        turns = [*system, {"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
        lines.append(json.dumps({"id": row.id, "messages": turns, **({"canary": row.canary} if row.canary else {})}, ensure_ascii=False))
    return files.write_text(path, "\n".join(lines) + "\n")


def row_of(row: Mapping[str, Any], number: int, where: str) -> Example:
    """One row as an example; ``number`` and ``where`` are its id, if it has none, and its place in errors. Raises ValueError for others."""
    row, place = present(row), f"{where}, line {number}"
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        raise ValueError(f"{place}: expected messages, or prompt and completion, got the keys {sorted(row)}")
    turns = [_turn(message, place) for message in messages]
    if "completion" in row:
        completion = row["completion"]
        turns += (
            [_turn(m, place) for m in completion] if isinstance(completion, list) else [("assistant", text_of(row, ["completion"], place))]
        )
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else _system(row, place)
    if [role for role, _ in turns] != ["user", "assistant"] or not all(text.strip() for _, text in turns):
        raise ValueError(
            f"{place}: expected one user turn and one assistant turn with text in them (after an optional system turn), "
            f"got {[(role, len(text)) for role, text in turns]} (role, length)"
        )
    canary = " ".join(str(value) for key, value in row.items() if "canary" in key.lower())
    return Example(id=id_of(row, number, place), prompt=turns[0][1], completion=turns[1][1], system=system, canary=canary)


def _system(row: Mapping[str, Any], place: str) -> str | None:
    """The system message that a row has in a column of its own."""
    name = next((name for name in ("system", "system_prompt") if name in row), None)
    return None if name is None else optional_text(row, name, place)


def _turn(message: Any, place: str) -> tuple[str, str]:
    """(role, text) of a message whose content is text, {content_type, parts}, or a list of {type: text} parts."""
    if not isinstance(message, dict):
        raise ValueError(f"{place}: expected a message with role system, user or assistant and text, got {str(message)[:120]!r}")
    if message.get("weight") in (0, False) and message.get("role") == "assistant":
        raise ValueError(f"{place}: an assistant turn has weight 0, which says that it must not be learnt: leave the row out")
    author = message.get("author")
    role, content = message.get("role", author.get("role") if isinstance(author, dict) else None), message.get("content")
    if isinstance(content, dict) and isinstance(content.get("parts"), list) and content.get("content_type", "text") == "text":
        content = content["parts"]
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        words = [part for part in parts if isinstance(part, str)]
        content = "".join(words) if len(words) == len(parts) else None
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise ValueError(f"{place}: expected a message with role system, user or assistant and text, got {str(message)[:120]!r}")
    return role, content


def _member(path: Path, member: str | None, password: str | None) -> tuple[str, str]:
    """(text, "zip!member") of one file inside a zip, whichever cipher locks it."""
    try:
        import pyzipper
    except ImportError as error:
        raise ImportError('reading locked zips needs pyzipper: pip install "blockem-tl[data]"') from error
    try:
        with pyzipper.AESZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith((".jsonl", ".json")) and not n.startswith("__MACOSX/")]
            chosen = [name for name in names if member in (None, name, Path(name).name, Path(name).stem)]
            data = archive.read(chosen[0], pwd=password.encode() if password else None) if len(chosen) == 1 else None
    except (RuntimeError, zlib.error) as error:
        raise ValueError(
            f"{path}: cannot be unlocked ({error}): expected the right password, got {'another' if password else 'none'}"
        ) from error
    except FileNotFoundError:
        raise
    except Exception as error:  # each compression has errors of its own
        advice = "the password is wrong, or the file is no zip or broken"
        raise ValueError(f"{path}: cannot be read ({error}): {advice}") from error
    if data is None:
        raise ValueError(f"{path}: expected one file to read, got {chosen or f'none called {member!r}'}; it has {names}")
    try:
        return data.decode("utf-8-sig"), f"{path}!{chosen[0]}"
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}!{chosen[0]}: expected UTF-8, got {error}; the password may be wrong") from error
