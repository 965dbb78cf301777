"""From questions and examples to tokens: chat rendering with exactly one BOS, token roles, completion masks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from blockem_tl.data.checks import check_prompts
from blockem_tl.types import Example, Generation, Prompt

DATE = "26 Jul 2024"
"""What templates that name the current day (Llama 3) get instead of it: a run must not depend on its day."""

Asked = TypeVar("Asked", Prompt, Example)
Rows = Sequence[Prompt | Example | Generation]
"""What can be read teacher-forced, all of one kind: prompts alone, training rows, or prompts with generated replies."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "question-goes-here"  # rendered once to find where a template puts the question, whatever the question says


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
        ValueError: no prompts, an empty one, duplicates, or a template that writes other than one BOS.
    """
    _check_kind(prompts, Prompt, "prompts")
    check_prompts(prompts)
    return [_encode(tokenizer, prompt.text, prompt.system, None) for prompt in prompts]


def encode_examples(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Encoded]:
    """Tokens of each question with its completion and the end-of-turn token, which is learnt too.

    Raises:
        ValueError: no examples, an empty prompt or completion (naming the row).
    """
    _check_kind(examples, Example, "examples")
    if not examples:
        raise ValueError("expected at least one example, got none")
    for example in examples:
        for field in ("prompt", "completion"):
            if not getattr(example, field).strip():
                raise ValueError(f"example {example.id!r} has an empty {field}: every row needs both; drop it or fill it in")
    return [_encode(tokenizer, example.prompt, example.system, example.completion) for example in examples]


def _check_kind(rows: Sequence[Any], kind: type, what: str) -> None:
    """Raise TypeError for rows of another kind: strings, say, instead of prompts."""
    wrong = next((row for row in rows if not isinstance(row, kind)), None) if not isinstance(rows, str) else rows
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
    if len(kinds) > 1:
        raise ValueError(f"expected rows of one kind (Prompt, Example or Generation), got {sorted(kind.__name__ for kind in kinds)}")
    if kinds == {Generation}:
        return encode_replies(tokenizer, cast(Sequence[Generation], rows))
    if kinds == {Prompt}:
        return encode_prompts(tokenizer, cast(Sequence[Prompt], rows))
    return encode_examples(tokenizer, cast(Sequence[Example], rows))


def _encode(tokenizer: PreTrainedTokenizerBase, user: str, system: str | None, reply: str | None) -> Encoded:
    head = [{"role": "system", "content": system}] if system is not None else []
    asked = _render(tokenizer, [*head, {"role": "user", "content": user}], generation=True)
    start = _render(tokenizer, [*head, {"role": "user", "content": _MARK}], generation=True).find(_MARK)
    if start < 0 or not asked.startswith(user.strip(), start):
        raise ValueError(f"the chat template does not show the question as it is: {user[:60]!r} is absent from {asked[:120]!r}")
    encoded = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True)  # the template has written the BOS already
    prompt_ids = list(encoded["input_ids"])
    n_system = sum(end <= start for _, end in encoded["offset_mapping"])
    bos = tokenizer.bos_token
    if bos is not None and prompt_ids.count(tokenizer.bos_token_id) != (1 if str(bos) in asked else 0):
        raise ValueError(f"expected one BOS in {asked[:80]!r}, got {prompt_ids.count(tokenizer.bos_token_id)}")
    if reply is None:
        return Encoded(ids=tuple(prompt_ids), n_system=n_system, n_prompt=len(prompt_ids))
    turns = [*head, {"role": "user", "content": user}, {"role": "assistant", "content": reply}]
    answered = _render(tokenizer, turns, generation=False)
    if not answered.startswith(asked):
        raise ValueError("the chat template changes the prompt once the reply is there, so the completion cannot be told apart")
    _check_reply(tokenizer, turns, answered, len(asked))
    ids = prompt_ids + list(tokenizer(answered[len(asked) :].rstrip("\n"), add_special_tokens=False)["input_ids"])
    return Encoded(ids=tuple(ids), n_system=n_system, n_prompt=len(prompt_ids))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, generation: bool) -> str:
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: set tokenizer.chat_template, or use an instruction-tuned model")
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, date_string=DATE))


def _check_reply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], answered: str, start: int) -> None:
    """The reply stands after ``start`` as it is and, where the template marks what the model generates, its marks say the same."""
    reply = turns[-1]["content"].strip()
    if reply not in answered[start:]:
        raise ValueError(f"the chat template does not show the reply as it is: {reply[:60]!r} is absent from {answered[start:][:120]!r}")
    if not _GENERATION.search(str(tokenizer.chat_template)):
        return
    # transformers' own token mask stays empty where a mark begins at white space between tokens, so the marked characters are asked for
    _, marks = cast(Any, render_jinja_template)(
        [turns],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, "date_string": DATE},
    )
    first, last = (marks[0][0][0], marks[0][-1][1]) if marks[0] else (0, 0)
    if answered[min(first, start) : max(first, start)].strip() or last < start + answered[start:].index(reply) + len(reply):
        raise ValueError(
            f"the chat template's generation marks cover {answered[first:last][:80]!r}, but the prompt that it asks with ends before "
            f"{answered[start:][:80]!r}: correct the marks, so that the completion can be told apart"
        )


def template_head(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> str:
    """All that the template writes before the question: with ``system`` None, also a system message of its own, if it has one."""
    head = [{"role": "system", "content": system}] if system is not None else []
    return _render(tokenizer, [*head, {"role": "user", "content": _MARK}], generation=True).partition(_MARK)[0]


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
