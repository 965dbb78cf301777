"""Requests to a judging model and its completions, the same wherever the model runs."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


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


class NoLogprobs(ValueError):  # noqa: N818 - reads as what happened
    """The judging model leaves out the log-probabilities that it was asked for."""


def completion_of(text: str, request: Request, *, cut: bool, tokens: Sequence[Mapping[str, Any]] | None) -> Completion:
    """A completion from a chat answer and its tokens, each with "token" and "top_logprobs" as OpenAI's protocol has them.

    Raises NoLogprobs if the request asked for alternatives and there are no tokens.
    """
    if request.alternatives and tokens is None:
        raise NoLogprobs(
            "this judging model returns no log-probabilities, which a rubric with scores is read from: use a rubric with labels, or a "
            "server that returns them (vLLM does)"
        )
    spoken = (token for token in tokens or () if token["token"].strip())
    first = next(spoken, None) if request.alternatives else None
    return Completion(
        text=_chosen(text, request.choices),
        first=first["token"] if first else "",
        alternatives=tuple((option["token"], option["logprob"]) for option in first["top_logprobs"]) if first else (),
        cut=cut,
    )


def _chosen(text: str, choices: tuple[str, ...]) -> str:
    """The label in a forced choice that came as JSON, however loosely kept; other text as it is, for the parser to judge."""
    if not choices or not text.lstrip().startswith(("{", "`")):
        return text
    try:
        found = json.loads(re.sub(r"^\s*```(?:json)?|```\s*$", "", text.strip()))
        value = next(iter(found.values())) if len(found) == 1 else found["label"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return text
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else text


def label_schema(choices: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of a forced choice."""
    return {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": list(choices)}},
        "required": ["label"],
        "additionalProperties": False,
    }
