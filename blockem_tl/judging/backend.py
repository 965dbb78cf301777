"""Requests to a judging model and its completions, the same wherever the model runs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question to the judging model.

    turns: (role, text) pairs, oldest first.  choices: the only replies allowed; none means free text.
    alternatives: how many of the first token's likeliest alternatives to return, 0 for none.
    """

    turns: tuple[tuple[str, str], ...]
    max_tokens: int
    choices: tuple[str, ...] = ()
    alternatives: int = 0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One answer of the judging model.

    alternatives: (token text, natural log-probability) of the first token that is no white space.  first: that token's text.
    cut: whether it ended at the token limit, perhaps in the middle of a thought.
    refused: why this one request will never be answered (too long, filtered) although others are; its verdict is UNPARSED.
    """

    text: str
    alternatives: tuple[tuple[str, float], ...] = ()
    first: str = ""
    cut: bool = False
    refused: str = ""


@runtime_checkable
class Backend(Protocol):
    """A judging model: an `Endpoint`, a `LocalVLLM`, or yours."""

    @property
    def name(self) -> str:
        """The name under which its verdicts are stored and reported."""
        ...

    def check(self) -> None:
        """Raise, before long work starts, if the model cannot be asked."""
        ...

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[int, Completion]]:
        """(index of the request, completion) pairs, every index once, in whatever order they are done."""
        ...
