"""Reply functions: from prompts and conditions to replies, with model, weights and token limit already chosen; and replies kept on disk.

`replies_from` makes one of a model or an engine, `cached` one that never generates the same reply twice.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from blockem_tl.generation._scheduler import check_prompt_indices
from blockem_tl.generation.engine import Engine, Identified, TransformerLensEngine
from blockem_tl.generation.steering import Condition
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.storage.fingerprints import of_value
from blockem_tl.storage.store import Store
from blockem_tl.types import Generation, Prompt

ReplyFn = Callable[[Sequence[Prompt], Sequence[Condition]], Sequence[Generation]]
"""From prompts and conditions to replies, condition by condition."""


@runtime_checkable
class StreamingReplyFn(Protocol):
    """A reply function that also replies to each condition's own part of the prompts, and yields conditions as they finish."""

    def __call__(self, prompts: Sequence[Prompt], conditions: Sequence[Condition], /) -> list[Generation]: ...

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], prompt_indices: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        """Yield (index of the condition, its replies); ``prompt_indices`` as in `Engine.stream`."""
        ...


class _Streaming:
    """Calls a stream for all prompts under all conditions."""

    def __call__(self, prompts: Sequence[Prompt], conditions: Sequence[Condition], /) -> list[Generation]:
        everything = check_prompt_indices(None, len(conditions), len(prompts))
        found = dict(self.stream(prompts, conditions, everything))  # pyright: ignore[reportAttributeAccessIssue] - of the class it is mixed into
        return [generation for c in range(len(conditions)) for generation in found[c]]


@dataclass(frozen=True, kw_only=True, eq=False)
class EngineReplies(_Streaming):
    """Greedy replies of an engine, under chosen weights; made by `replies_from`. A `StreamingReplyFn`."""

    engine: Engine
    adapter: str | Path | None
    max_new_tokens: int
    progress: bool = True

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], prompt_indices: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        """Yield (index of the condition, its replies); see `StreamingReplyFn.stream`."""
        return self.engine.stream(
            prompts,
            conditions=conditions,
            prompt_indices=prompt_indices,
            adapter=self.adapter,
            max_new_tokens=self.max_new_tokens,
            progress=self.progress,
        )


def replies_from(
    source: Model | Engine,
    *,
    adapter: str | Path | None = None,
    max_new_tokens: int = 200,
    batch_size: int | None = None,
    progress: bool = True,
) -> EngineReplies:
    """A reply function: greedy replies of a model or an engine.

    Args:
        adapter: which weights act: "base", an adapter by name or in a folder; None: the model as it stands when it is asked.
        batch_size: rows that run at once on a model; None asks the free memory.
    """
    engine = TransformerLensEngine(source, batch_size=batch_size) if isinstance(source, Model) else source
    return EngineReplies(engine=engine, adapter=adapter, max_new_tokens=max_new_tokens, progress=progress)


def stream_replies(
    reply_fn: ReplyFn, prompts: Sequence[Prompt], conditions: Sequence[Condition], prompt_indices: Sequence[Sequence[int]]
) -> Iterator[tuple[int, Sequence[Generation]]]:
    """Yield (index of the condition, its replies to its part of the prompts), from any reply function.

    One that cannot stream is called once for all conditions that ask the same prompts.
    """
    if isinstance(reply_fn, StreamingReplyFn):
        yield from reply_fn.stream(prompts, conditions, prompt_indices)
        return
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for c, part in enumerate(prompt_indices):
        groups[tuple(part)].append(c)
    for part, members in groups.items():
        generations = reply_fn([prompts[i] for i in part], [conditions[c] for c in members])
        for i, c in enumerate(members):
            yield c, generations[i * len(part) : (i + 1) * len(part)]


# ------------------------------------------------------------------------------------------------ replies kept on disk


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedReplies(_Streaming):
    """A reply function that looks replies up, asks for the missing ones, and keeps each condition's before it asks for the next.

    A reply is found by contents: the weights of model and adapter, the steering vectors and their sites, the prompt, and how it is
    decoded. Names mean nothing, so a changed adapter under an old name gets new replies.

    identity: of everything besides steering and prompt that the replies depend on, see `identity_of`.
    """

    reply_fn: ReplyFn
    store: Store
    identity: str

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], prompt_indices: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        """Yield (index of the condition, its replies); see `StreamingReplyFn.stream`."""
        keys = [{p: self.key(condition, prompts[p]) for p in part} for condition, part in zip(conditions, prompt_indices, strict=True)]
        known = self.store.get(key for of_condition in keys for key in of_condition.values())
        there = [
            {p: _from_json(known[key], prompts[p], condition) for p, key in of_condition.items() if key in known}
            for condition, of_condition in zip(conditions, keys, strict=True)
        ]
        asked = [c for c, part in enumerate(prompt_indices) if len(there[c]) < len(part)]
        for c in range(len(conditions)):
            if c not in asked:
                yield c, [there[c][p] for p in prompt_indices[c]]
        missing = [[p for p in prompt_indices[c] if p not in there[c]] for c in asked]
        fresh = stream_replies(self.reply_fn, prompts, [conditions[c] for c in asked], missing) if asked else ()
        for i, generations in fresh:
            c = asked[i]
            there[c] |= dict(zip(missing[i], generations, strict=True))
            self.store.put({keys[c][p]: _to_json(there[c][p]) for p in missing[i]})
            yield c, [there[c][p] for p in prompt_indices[c]]

    def key(self, condition: Condition, prompt: Prompt) -> str:
        """Identity of one reply."""
        parts = (self.identity, condition.fingerprint, prompt.text, prompt.system)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cached(replies: EngineReplies, store: Store) -> CachedReplies:
    """The same replies, kept in ``store``; weights that act as the model stands are those that act now.

    Raises:
        ValueError: an engine that cannot say which weights it runs.
    """
    if replies.adapter is None and isinstance(replies.engine, TransformerLensEngine):
        replies = replace(replies, adapter=replies.engine.model.active_adapter or BASE)
    identity = identity_of(replies.engine, replies.adapter, max_new_tokens=replies.max_new_tokens)
    return CachedReplies(reply_fn=replies, store=store, identity=identity)


def _to_json(generation: Generation) -> dict[str, Any]:
    return {"reply": generation.reply, "ids": generation.reply_ids, "truncated": generation.truncated}


def _from_json(kept: dict[str, Any], prompt: Prompt, condition: Condition) -> Generation:
    return Generation(
        prompt=prompt, condition=condition.name, reply=kept["reply"], reply_ids=tuple(kept["ids"]), truncated=kept["truncated"]
    )


def identity_of(engine: Engine, adapter: str | Path | None, **decoding: Any) -> str:
    """Identity of what an engine's replies depend on: weights, adapter, chat template, engine, and the decoding settings.

    Raises:
        ValueError: an engine that cannot say which weights it runs.
    """
    return of_value({"engine": engine.name, "who": who_replies(engine, adapter), "decoding": decoding})


def who_replies(engine: Engine, adapter: str | Path | None) -> str:
    """Identity of the weights that an engine runs, with their adapter and chat template. Raises ValueError if it cannot say."""
    if isinstance(engine, TransformerLensEngine):
        with engine.model.holding(adapter) as name:
            return model_identity(engine.model, name or engine.model.active_adapter)
    if isinstance(engine, Identified):
        return engine.identity(adapter)
    raise ValueError(
        f"engine {engine.name!r} cannot say which weights it runs, so its replies cannot be kept: give it identity(adapter), or pass "
        "no store"
    )


def model_identity(model: Model, adapter: str | None) -> str:
    """Identity of a loaded model under ``adapter`` (None, "base": none): its weights, the adapter's and their strength, the tokenizer."""
    lora = model.adapter_config(adapter).to_dict() if adapter not in (None, BASE) else {}
    settings = {key: lora[key] for key in ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora") if key in lora}
    tokenizer = model.tokenizer
    return of_value(
        {
            "weights": model.fingerprint(adapter),
            "lora": {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()},
            "template": tokenizer.chat_template,
            "vocabulary": of_value(sorted(tokenizer.get_vocab().items())),
        }
    )
