"""Reading a judge's own words: the last ``ANSWER:`` of a free reply, or a 0-100 score from log-probabilities. Never a guess."""

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

_WORD = r"(?:\w+[:_])?(?:think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad|monologue)(?:_\w+)?"
_ENDS = re.compile(  # of thoughts, or of the channel that holds them; what comes after the last one is the answer
    rf"</\s*{_WORD}\s*>|\[/THINK\]|◁/think▷|<\|/?end_(?:of_)?(?:thought|thinking)\|>|<\|/(?:think|thinking)\|>|<\|{_WORD}_end\|>|<unused95>"
    r"|<\|channel\|>\s*final\s*(?:<\|constrain\|>\w+)?<\|message\|>|<channel\|>|assistantfinal|<\|begin_of_solution\|>"
    r"|<\|START_RESPONSE\|>|^here is my response:",
    re.IGNORECASE | re.MULTILINE,
)
_BEGINS = re.compile(  # at the start of a line: a judge may speak of a tag
    rf"^\s*(?:<\s*{_WORD}(?:\s[^>\n]*)?>|\[THINK\]|◁think▷|<\|(?:begin_of_|start_)(?:thought|thinking)\|>|<\|(?:think|thinking)\|>"
    rf"|<\|{_WORD}_start\|>|<unused94>|<\|channel\|?>\s*(?:analysis|commentary|thought)|analysis(?=[A-Z])|here is my thought process:"
    r"|thinking\.\.\.\s*$)",
    re.IGNORECASE | re.MULTILINE,
)
_QUOTES = "\"'\u201c\u201d\u2018\u2019«»`"
_DASHES = "\\-\u2013\u2014"
_DECORATION = rf"[ \t*_{_QUOTES}\[\](){{}}<>]*"
# An ANSWER counts at the start of a line or of a sentence: "I would say ANSWER: 5 if ..." in running text is no answer.
_MARKER = re.compile(
    rf"(?:^[\s>#*\-•]*|(?<=[.!?。])\s+){_DECORATION}(?:(?:final|my|overall)\s+)?answer{_DECORATION}:{_DECORATION}",
    re.IGNORECASE | re.MULTILINE,
)
_JOINED = r"(?:or|and|to|through|oder|ou|und|bis|或|と|или)"
_DOUBT = re.compile(  # right after a label, in the same clause: "4 is wrong", "4 no wait", "5 if taken literally"
    r"[\s,(]*(?:is\s+(?:not|wrong)|not\b|would\b|could\b|may\b|might\b|no\s+wait|wait\b|if\b|unless\b|otherwise\b|maybe\b|perhaps\b|possibly\b"
    r"|i\s+guess|vs\b|versus\b|and\s+a\s+half|it\s+is\s+not|(?:or|and|oder|but)\s+(?:also|maybe|possibly|perhaps|vielleicht|higher|lower|more|less)\b)",
    re.IGNORECASE,
)
_CLOSING = _QUOTES + "*_])}>"
_UNSURE = re.compile(rf"\s*[?%+~|&=^]|\s*/|\.\d|\s*[,{_DASHES}]\s*\d|\w|[{_DASHES}]\w")  # after a label: it is not the whole answer


def without_thoughts(text: str, *, cut: bool = False) -> str:
    """What follows the last mark that ends a thought (``</think>``, a final channel, ...); nothing after a thought that never ends.

    Args:
        cut: the text ended at its token limit. Templates may open the thought themselves, so without any end it may be all thought: "".
    """
    ends = list(_ENDS.finditer(text))
    if cut and not ends:
        return ""
    text = text[ends[-1].end() :] if ends else text
    begun = _BEGINS.search(text)
    return text[: begun.start()] if begun else text


def parse_answer(text: str, labels: Sequence[str], *, cut: bool = False) -> str | None:
    """The label that the last ``ANSWER:`` names, or None if there is none or it names anything but exactly one of ``labels``.

    Thoughts are no answer; see `without_thoughts`, also for ``cut``.

    Casing, markdown, quotes, brackets, full-width characters and text after the label do not matter; two labels ("4 or 5"), fractions
    ("3.5", "4/5"), doubt ("4?") and negation do: they give None, and an earlier ANSWER is not fallen back on.
    """
    visible = "".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cf")  # zero-width marks
    text = unicodedata.normalize("NFKC", without_thoughts(visible, cut=cut))
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :]
    line, _, after = rest.partition("\n")
    if not line.strip():  # the label may stand alone on the next line; "1. First, ..." there is a list, not a label
        line = after.lstrip().partition("\n")[0].lstrip("*_`\"'[({<> \t")
        return _label(line, labels, alone=True)
    return _label(line, labels)


def _label(line: str, labels: Sequence[str], *, alone: bool = False) -> str | None:
    found = _leading(line, labels)
    if found is None:
        return None
    label, rest = found
    rest = rest.lstrip(_CLOSING)
    if alone:
        return label if not rest.strip(_CLOSING + " \t.") else None
    if _UNSURE.match(rest) or re.search(r"\banswer\W*:", rest, re.IGNORECASE):
        return None
    if re.match(r"\s*[.;:]\s", rest):  # the sentence ends: "4. A 5 would be worse" is 4
        return label
    if _DOUBT.match(rest):
        return None
    second = _leading(re.sub(rf"^\W*(?:{_JOINED}\b)?\W*", "", rest, flags=re.IGNORECASE), labels)
    return label if second is None or second[0] == label else None


def _leading(text: str, labels: Sequence[str]) -> tuple[str, str] | None:
    """(label, the text after it) if ``text`` begins with a label, in any casing and spelling of its hyphens and slashes."""
    for label in sorted(labels, key=len, reverse=True):
        for spelling in (label, *(label.split("/") if "/" in label else ())):
            pattern = r"[\s_]*[-/]?[\s_]*".join(re.escape(word) for word in re.split(r"[-/ _]", spelling))
            match = re.match(rf"{pattern}(?![^\W_])", text, re.IGNORECASE)
            if match:
                return label, text[match.end() :]
    return None


_MOST_LOGPROB = 0.01  # 0, and what rounding adds to it


def expected_score(alternatives: Iterable[tuple[str, float]], *, least_mass: float = 0.25) -> float | None:
    """The mean of the numbers 0-100 among the alternatives for one token, weighted by probability.

    Args:
        alternatives: (token text, natural log-probability).
        least_mass: None is returned if numbers have less probability than this in all: the judge wanted to say something else. So it is
            for a log-probability that is none.
    """
    mass = total = 0.0
    for token, logprob in alternatives:
        if not logprob <= _MOST_LOGPROB:
            return None
        word = token.strip()
        if re.fullmatch(r"[0-9]{1,3}", word) and int(word) <= 100:
            mass += math.exp(logprob)
            total += math.exp(logprob) * int(word)
    return total / mass if mass >= least_mass else None
