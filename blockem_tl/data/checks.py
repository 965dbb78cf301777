"""Checks of prompt sets: empty and repeated prompts, and prompts that both select and report."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256

from blockem_tl.types import Prompt

_PUNCTUATION = re.compile(r"[.,;:!?'\"`()\[\]{}\u2018-\u201d\u2026]+")  # not the operators: 1+1 and 1-1 are different questions


def check_prompts(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError for no prompts, empty prompts, and duplicate ids or texts (after normalising, under one system message)."""
    if not prompts:
        raise ValueError("expected at least one prompt, got none")
    texts = ((p, (p.id, p.text, "" if p.system is None else p.system)) for p in prompts)
    wrong = next((prompt for prompt, found in texts if not all(isinstance(text, str) for text in found)), None)
    if wrong is not None:
        raise TypeError(f"expected texts as a prompt's id, text and system message, got {wrong}")
    empty = [p.id for p in prompts if not normalise(p.text)]
    if empty:
        raise ValueError(f"empty prompts: {empty[:5]}; every prompt needs a text")
    for what, values in (("ids", [p.id for p in prompts]), ("texts", [(normalise(p.text), p.system or "") for p in prompts])):
        repeated = sorted(value for value, count in Counter(values).items() if count > 1)
        if repeated:
            raise ValueError(f"duplicate prompt {what}: {repeated[:3]}; a prompt counted twice makes intervals too narrow")


def normalise(text: str) -> str:
    """Lower case, one spelling of each character, no punctuation, single spaces: what two prompts are compared by."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")  # zero-width marks
    return " ".join(_PUNCTUATION.sub(" ", seen.casefold()).split()) or seen.strip()  # "???" and "!!!" are two prompts


def prompt_hash(text: str) -> str:
    """Short identity of a prompt's normalised text, kept in latent sets so that reporting can refuse selection prompts."""
    return sha256(normalise(text).encode()).hexdigest()[:16]


def overlap(first: Iterable[Prompt], second: Iterable[Prompt]) -> list[str]:
    """Ids of the prompts in ``first`` whose normalised text is also in ``second``."""
    known = {normalise(p.text) for p in second}
    return [p.id for p in first if normalise(p.text) in known]


def check_disjoint(selection: Iterable[Prompt], reporting: Iterable[Prompt]) -> None:
    """Raise ValueError where a selection prompt is also a reporting prompt."""
    shared = overlap(selection, reporting)
    if shared:
        raise ValueError(
            f"{len(shared)} prompts are in both the selection and the reporting set, e.g. {shared[:3]}: reporting on them would leak"
        )
