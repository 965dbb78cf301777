"""What a chat template writes, the same on every day, and which tokens it keeps for itself."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.meta
from transformers import PreTrainedTokenizerBase

DATE = "26 Jul 2024"
"""What templates that name the current day (Llama 3) get instead of it: a run must not depend on its day."""

_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # transformers' own
_parser = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
_DAY = datetime.strptime(DATE, "%d %b %Y")
_PINNED = "{#- pinned by blockem_tl -#}"
_QUESTION, _REPLY = "question-goes-here", "reply-goes-here"  # rendered to find where a template puts question and reply
FIXED: Mapping[str, Any] = {"date_string": DATE, "strftime_now": _DAY.strftime}
"""What every rendering is given, so that templates that ask for the day get the same one."""

Messages = Sequence[dict[str, str]]


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, generation: bool) -> str:
    """The conversation as text; with ``generation`` it ends where the model's reply begins.

    A template without a system role gets an empty system message left out, since that is what it asks for.

    Raises:
        ValueError: no template, or one that refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: set tokenizer.chat_template, or use an instruction-tuned model")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation, **FIXED))
    except Exception as error:  # a template is a program, which may raise anything
        if messages[0]["role"] == "system" and not messages[0]["content"].strip():
            return render(tokenizer, messages[1:], generation=generation)
        roles = [message["role"] for message in messages]
        hint = "; it may know no system role: put the message into the question" if "system" in roles else ""
        raise ValueError(f"the chat template refuses a conversation of {roles}: {error}{hint}") from error


def template_head(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> str:
    """All that the template writes before the question: with ``system`` None, also a system message of its own, if it has one."""
    mark = absent_from(_QUESTION, system or "")
    return render(tokenizer, [*system_turn(system), {"role": "user", "content": mark}], generation=True).partition(mark)[0]


def system_turn(system: str | None) -> list[dict[str, str]]:
    """The system message as a turn; none for None."""
    return [] if system is None else [{"role": "system", "content": system}]


def absent_from(word: str, text: str) -> str:
    """A variant of ``word`` that ``text`` does not contain."""
    while word in text:
        word += "-x"
    return word


def pin_arguments(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, bool | int | str | None]) -> None:
    """Set arguments of the template once and for all, such as ``{"enable_thinking": False}`` (Qwen 3).

    They become part of ``tokenizer.chat_template``, so they hold wherever it is rendered and count in every identity.

    Raises:
        ValueError: no template, or an argument that the template does not mention.
    """
    template = tokenizer.chat_template
    if not arguments:
        return
    if not isinstance(template, str):
        raise ValueError(f"template arguments: expected a tokenizer with one chat template, got {type(template).__name__}")
    if not isinstance(arguments, Mapping) or not all(isinstance(value, (bool, int, str, type(None))) for value in arguments.values()):
        raise ValueError(f"template arguments: expected true, false, whole numbers, texts or None by name, got {arguments!r}")
    if spelt := [name for name, value in arguments.items() if isinstance(value, str) and value.lower() in ("true", "false")]:
        raise ValueError(f"template arguments: {spelt} are texts, which Jinja takes for true whatever they say: write True or False")
    try:
        free = jinja2.meta.find_undeclared_variables(_parser.parse(_GENERATION_TAG.sub("", template)))
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"template arguments: the chat template is broken: {error}") from error
    unknown = [name for name in arguments if name not in free]
    if unknown:
        raise ValueError(f"template arguments: this model's chat template does not mention {unknown}; its text is tokenizer.chat_template")
    lines = [f"{{%- set {name} = {_literal(value)} -%}}" for name, value in arguments.items()]
    tokenizer.chat_template = "".join([_PINNED, *lines, _PINNED, template])


def _literal(value: bool | int | str | None) -> str:
    """A value as Jinja writes it, which spells true, false and none as JSON does but for null."""
    return "none" if value is None else json.dumps(value)


def thinking_argument(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template's argument that switches thoughts on and off, if it has one that is not pinned."""
    template = str(tokenizer.chat_template or "")
    known = [name for name in ("enable_thinking", "thinking", "reasoning_effort") if re.search(rf"\b{name} is (not )?defined", template)]
    return next((name for name in known if f"{{%- set {name} = " not in template), None)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Texts that the tokenizer turns into one token each: turns, ends, padding, and other added tokens that the template writes."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {str(token) for token in tokenizer.all_special_tokens}
    roles = {str(token) for name, token in tokenizer.special_tokens_map.items() if name != "unk_token" and isinstance(token, str)}
    return frozenset((special - ({str(tokenizer.unk_token)} - roles)) | {t.content for t in added if t.content in _written(tokenizer)})


def _written(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the template writes around a question and a reply."""
    turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    try:
        return render(tokenizer, turns, generation=True)
    except ValueError:
        return ""


def bos_opens_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the BOS stands at every turn (ChatML models whose BOS is ``<|im_start|>``), not only at the start of the text."""
    if not tokenizer.chat_template or tokenizer.bos_token is None:
        return False
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}]
    return render(tokenizer, turns, generation=True).count(str(tokenizer.bos_token)) > 1


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that follows a reply, which training teaches and which therefore ends one; None if the template writes none."""
    if not tokenizer.chat_template:
        return None
    answered = render(tokenizer, [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}], generation=False)
    after = answered.rpartition(_REPLY)[2].strip()
    first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
    own = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    return next((int(token) for token in first if token in own), None)


def end_tokens(tokenizer: PreTrainedTokenizerBase, configured: int | Sequence[int | None] | None) -> list[int]:
    """Every token id that ends a reply: the tokenizer's, those of the model's generation config, and what training teaches."""
    of_model = list(configured) if isinstance(configured, (list, tuple)) else [configured]
    found = [tokenizer.eos_token_id, *of_model, end_of_turn(tokenizer)]
    return sorted({int(token) for token in found if token is not None})
