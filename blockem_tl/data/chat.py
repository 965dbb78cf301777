"""From questions and examples to tokens: chat rendering with exactly one BOS, token roles, completion masks."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from blockem_tl.data.checks import check_prompts
from blockem_tl.data.templates import FIXED, absent_from, control_tokens, render, system_turn
from blockem_tl.types import Example, Generation, Pair, Prompt

Asked = TypeVar("Asked", Prompt, Example, Pair)
Rows = Sequence[Prompt | Example | Generation]
"""What can be read teacher-forced, all of one kind: prompts alone, training rows, or prompts with generated replies."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_QUESTION = "question-goes-here"  # rendered to find where a template puts the question, whatever the question says


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """One tokenised row: ``n_system`` tokens of template and system message, then the user turn, and the reply from ``n_prompt`` on."""

    ids: tuple[int, ...]
    n_system: int
    n_prompt: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded token tensors, all [batch pos]. ``reply`` marks reply tokens, ``system`` template and system tokens; neither marks padding."""

    ids: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    system: Bool[Tensor, "batch pos"]
    reply: Bool[Tensor, "batch pos"]

    @classmethod
    def from_labels(cls, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> "Batch":
        """What another training script has collated, each [batch pos]: supervised tokens, with a label that is not -100, are the reply's.

        Raises:
            ValueError: shapes that differ: packed rows have no such mask.
        """
        mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if not input_ids.shape == labels.shape == mask.shape:
            raise ValueError(
                f"expected input_ids, labels and attention_mask of one shape [batch pos], got {tuple(input_ids.shape)}, "
                f"{tuple(labels.shape)} and {tuple(mask.shape)}"
            )
        return cls(ids=input_ids, mask=mask, system=torch.zeros_like(mask), reply=(labels != -100) & mask)

    @property
    def positions(self) -> Int[Tensor, "batch pos"]:
        """Index of each token in its unpadded row (0 at padding)."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @property
    def roles(self) -> dict[str, Bool[Tensor, "batch pos"]]:
        """Every token has one: "system" (template and system message), "prompt" (the question and what asks for an answer), "reply"."""
        return {"system": self.system, "prompt": self.mask & ~self.system & ~self.reply, "reply": self.reply}


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[Encoded]:
    """Tokens of each question as the chat template asks the model to answer it.

    Raises:
        ValueError: no prompts, an empty one, duplicates; a text that spells control tokens or that the tokenizer does not keep; a
            template that refuses a prompt, does not show it as it is, or writes two BOS. The prompt is named.
    """
    _check_kind(prompts, Prompt, "prompts")
    check_prompts(prompts)
    return [_encode(tokenizer, f"prompt {prompt.id!r}", prompt.text, prompt.system, None) for prompt in prompts]


def encode_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Encoded]:
    """Tokens of each question with its completion and the end-of-turn token, which is learnt too.

    Raises:
        ValueError: no examples, an empty prompt or completion, or what `encode_prompts` refuses; a prompt whose tokens change once the
            completion is there. The row is named.
    """
    _check_kind(examples, Example, "examples")
    if not examples:
        raise ValueError("expected at least one example, got none")
    for example in examples:
        for field in ("prompt", "completion"):
            if not getattr(example, field).strip():
                raise ValueError(f"example {example.id!r} has an empty {field}: every row needs both; drop it or fill it in")
    return [_encode(tokenizer, f"example {example.id!r}", example.prompt, example.system, example.completion) for example in examples]


def _check_kind(rows: Sequence[Any], kind: type, what: str) -> None:
    """Raise TypeError for rows of another kind: strings, say, instead of prompts."""
    listed = isinstance(rows, Sequence) and not isinstance(rows, str)
    wrong = next((row for row in rows if not isinstance(row, kind)), None) if listed else rows
    if wrong is not None:
        how = {Prompt: 'Prompt(id="1", text="...")', Example: 'Example(id="1", prompt="...", completion="...")'}[kind]
        raise TypeError(f"{what}: expected a list of {how}, got {type(wrong).__name__}: {str(wrong)[:60]!r}")


def encode_replies(tokenizer: PreTrainedTokenizerBase, generations: Sequence[Generation]) -> list[Encoded]:
    """Tokens of each prompt with the very tokens of its reply; a prompt may have several replies.

    Raises:
        ValueError: no generations, replies without tokens, or prompts that `encode_prompts` refuses.
    """
    empty = [generation.prompt.id for generation in generations if not generation.reply_ids]
    if empty:
        raise ValueError(f"the replies to {empty[:5]} have no tokens: there is nothing to read, score or patch, leave these prompts out")
    prompts = list(dict.fromkeys(generation.prompt for generation in generations))
    asked = dict(zip(prompts, encode_prompts(tokenizer, prompts), strict=True))
    return [replace(asked[g.prompt], ids=asked[g.prompt].ids + g.reply_ids) for g in generations]


def encode_rows(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> list[Encoded]:
    """Tokens of prompts alone, of training rows, or of prompts with generated replies.

    Raises:
        ValueError: a mixture of these, or what the encoder of their kind refuses.
    """
    kinds = {type(row) for row in rows}
    if isinstance(rows, str) or kinds - {Prompt, Example, Generation}:
        got = repr(rows)[:60] if isinstance(rows, str) else sorted(kind.__name__ for kind in kinds)
        raise TypeError(
            f'expected a list of Prompt(id="1", text="..."), of Example(id="1", prompt="...", completion="...") or of Generation, got {got}'
        )
    if len(kinds) > 1:
        raise ValueError(f"expected rows of one kind (Prompt, Example or Generation), got {sorted(kind.__name__ for kind in kinds)}")
    if kinds == {Generation}:
        return encode_replies(tokenizer, cast(Sequence[Generation], rows))
    if kinds == {Prompt}:
        return encode_prompts(tokenizer, cast(Sequence[Prompt], rows))
    return encode_examples(tokenizer, cast(Sequence[Example], rows))


def _encode(tokenizer: PreTrainedTokenizerBase, row: str, user: str, system: str | None, reply: str | None) -> Encoded:
    """Tokens of one row, which errors call ``row``."""
    try:
        _check_text(tokenizer, user, system, reply)
        asked, start = _asked(tokenizer, user, system)
        tokens = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True)  # the template has written the BOS already
        prompt_ids = list(tokens["input_ids"])
        n_system = sum(end <= start for _, end in tokens["offset_mapping"])
        _check_bos(tokenizer, asked, prompt_ids)
        ids = prompt_ids if reply is None else _answered(tokenizer, user, system, reply, asked, prompt_ids)
    except ValueError as error:
        raise ValueError(f"{row}: {error}") from error
    return Encoded(ids=tuple(ids), n_system=n_system, n_prompt=len(prompt_ids))


def _check_text(tokenizer: PreTrainedTokenizerBase, user: str, system: str | None, reply: str | None) -> None:
    """Raise ValueError for text that would become control tokens (a forged turn, an end in the middle), or that is no Unicode."""
    if not tokenizer.is_fast:
        raise ValueError(f"expected a fast tokenizer, which knows where its tokens lie in the text, got {type(tokenizer).__name__}")
    control = control_tokens(tokenizer)
    for field, text in (("question", user), ("system message", system or ""), ("completion", reply or "")):
        spelt = sorted(token for token in control if token and token in text)
        if spelt:
            raise ValueError(
                f"its {field} spells the control tokens {spelt[:3]}, which the model would take for real ones: take them out, or "
                "write them in another way"
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"its {field} holds half of a surrogate pair, which is no character: {text[:60]!r}; repair the text")


def _asked(tokenizer: PreTrainedTokenizerBase, user: str, system: str | None) -> tuple[str, int]:
    """The prompt as text, and where the question begins in it."""
    mark = absent_from(_QUESTION, system or "")
    asked, marked = (render(tokenizer, [*system_turn(system), {"role": "user", "content": text}], generation=True) for text in (user, mark))
    start = marked.find(mark)
    if start < 0 or not (asked.startswith(user, start) or asked.startswith(user.strip(), start)):
        raise ValueError(f"the chat template does not show the question as it is: {user[:60]!r} is absent from {asked[:120]!r}")
    if system and system.strip() not in asked:
        raise ValueError(f'the chat template drops the system message {system[:60]!r}: put it into the question, or use the policy "none"')
    return asked, start


def _check_bos(tokenizer: PreTrainedTokenizerBase, asked: str, ids: Sequence[int]) -> None:
    """Raise ValueError unless the tokens spell the text, with one BOS at its start at most and none that the template did not write."""
    bos = tokenizer.bos_token
    doubled = bos is not None and asked.partition(str(bos))[2].lstrip().startswith(str(bos))
    if bos is not None and (ids.count(tokenizer.bos_token_id) != asked.count(str(bos)) or doubled):
        raise ValueError(
            f"expected the BOS {bos!r} where the template writes it, once at the start, got {ids.count(tokenizer.bos_token_id)} in "
            f"{asked[:80]!r}"
        )
    _check_kept(tokenizer, asked, ids)


def _check_kept(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> None:
    """Raise ValueError where letters or digits of ``text`` do not come back out of the tokens."""
    back = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if _letters(back) == _letters(text):
        return
    lost = [word for word in text.split() if word not in back.split()]
    raise ValueError(f"the tokenizer does not keep the text: {text[-80:]!r} came back as {back[-80:]!r}; lost: {lost[:5]}")


def _letters(text: str) -> str:
    """What tokenizers that lower, normalise and respace text leave alone."""
    if text.isascii():
        return "".join(filter(str.isalnum, text.lower()))
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text.casefold())))


def _answered(
    tokenizer: PreTrainedTokenizerBase, user: str, system: str | None, reply: str, asked: str, prompt_ids: list[int]
) -> list[int]:
    """Tokens of the prompt with its completion, as the joined text has them."""
    turns = [*system_turn(system), {"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    answered = render(tokenizer, turns, generation=False)
    if not answered.startswith(asked):
        raise ValueError("the chat template changes the prompt once the reply is there, so the completion cannot be told apart")
    _check_reply(tokenizer, turns, answered, len(asked))
    head = answered[len(asked) :].partition(reply.strip())[0]
    if head.strip() and asked == render(tokenizer, turns[:-1], generation=False):
        raise ValueError(
            f"the chat template writes no generation prompt, so a reply would begin with {head!r}: let it write that where "
            "add_generation_prompt is true"
        )
    joined = answered.rstrip("\n") if len(answered.rstrip("\n")) > len(asked) else answered
    ids = list(tokenizer(joined, add_special_tokens=False)["input_ids"])
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(
            f"the tokens of the prompt change once the reply {reply[:40]!r} is there, so none of them is where the reply begins: end the "
            "template's generation prompt at a token's end, without white space"
        )
    _check_kept(tokenizer, joined, ids)
    return ids


def _check_reply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], answered: str, start: int) -> None:
    """The reply stands after ``start`` as it is and, where the template marks what the model generates, its marks say the same."""
    reply = turns[-1]["content"].strip()
    if reply not in answered[start:]:
        raise ValueError(f"the chat template does not show the reply as it is: {reply[:60]!r} is absent from {answered[start:][:120]!r}")
    if not _GENERATION.search(str(tokenizer.chat_template)):
        return
    # transformers' own token mask stays empty where a mark begins at white space between tokens, so the marked characters are asked for
    _, marks = cast(Any, render_jinja_template)(
        [turns], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, **{**tokenizer.special_tokens_map, **FIXED}
    )
    first, last = (marks[0][0][0], marks[0][-1][1]) if marks[0] else (0, 0)
    if answered[min(first, start) : max(first, start)].strip() or last < start + answered[start:].index(reply) + len(reply):
        raise ValueError(
            f"the chat template's generation marks cover {answered[first:last][:80]!r}, but the prompt that it asks with ends before "
            f"{answered[start:][:80]!r}: correct the marks, so that the completion can be told apart"
        )


def apply_system(items: Sequence[Asked], policy: str) -> list[Asked]:
    """The items under one system prompt policy; a system message that an item has already stays.

    policy: "template" leaves it to the template, which may write a message of its own (Qwen 2.5 does).  "none" gives an empty system
    message, which suppresses such a default; what a template writes in any case (Llama 3.1's dates) stays, see
    `template_head`.  Anything else is the message itself.
    """
    if policy == "template":
        return list(items)
    text = "" if policy == "none" else policy
    return [item if item.system is not None else replace(item, system=text) for item in items]


def pad(rows: Sequence[Encoded], pad_id: int, *, side: str, device: torch.device | str = "cpu") -> Batch:
    """Stack rows of unequal lengths, padded on the "left" (generation) or "right" (training, reading)."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask, system, reply = (torch.zeros(len(rows), longest, dtype=torch.bool) for _ in range(3))
    for i, row in enumerate(rows):
        start = longest - len(row.ids) if side == "left" else 0
        end = start + len(row.ids)
        ids[i, start:end] = torch.tensor(row.ids)
        mask[i, start:end] = True
        system[i, start : start + row.n_system] = True
        reply[i, start + row.n_prompt : end] = True
    return Batch(ids=ids.to(device), mask=mask.to(device), system=system.to(device), reply=reply.to(device))


def check_lengths(rows: Sequence[Encoded], limit: int, *, room: int = 0) -> None:
    """Raise ValueError unless every row leaves ``room`` tokens in a context of ``limit``."""
    longest = max(len(row.ids) for row in rows)
    if longest + room > limit:
        raise ValueError(
            f"the longest row has {longest} tokens and needs room for {room} more, the model's context has {limit}: "
            "shorten the prompt or max_new_tokens"
        )
