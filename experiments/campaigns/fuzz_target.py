"""What a target of the fuzzing is: a parser, whole files to begin from, and the share of inputs that it gets."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Target:
    """A parser.

    seeds: whole files.  parse: reads the file, and checks what it made of it.  share: of the inputs.  file: the name that is written.
    structured: the seeds are JSON, or JSON lines.  named: errors name the file.
    """

    name: str
    seeds: Sequence[bytes]
    parse: Callable[[Path], Any]
    share: float
    file: str
    structured: bool = True
    named: bool = True


def lines(*rows: Any) -> bytes:
    """JSON lines."""
    return "\n".join(json.dumps(row) for row in rows).encode() + b"\n"


class Refused(Exception):  # noqa: N818 - a checksum that differs is the right answer
    """What a parser says rightly, without naming the file."""
