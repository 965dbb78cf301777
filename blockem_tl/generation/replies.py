"""Stages 1 to 3 in a row: from a tuned model to its latent set. Any stage can also be called alone; this is their composition."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from blockem_tl.generation._scheduler import check_parts
from blockem_tl.generation.engine import Engine, Identified, TransformerLensEngine
from blockem_tl.generation.steering import Condition
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.storage import files
from blockem_tl.storage.fingerprints import of_value
from blockem_tl.storage.store import insert_all, open_database
from blockem_tl.types import Generation, Prompt

Speaker = Callable[[Sequence[Prompt], Sequence[Condition]], list[Generation]]
"""Anything that replies to prompts under conditions, condition by condition: `generate` with a model and its settings bound."""


@runtime_checkable
class Streaming(Protocol):
    """A speaker that also replies to each condition's own part of the prompts, all in one batch, and yields conditions as they finish."""

    def __call__(self, prompts: Sequence[Prompt], conditions: Sequence[Condition], /) -> list[Generation]: ...

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], parts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        """Yield (index of the condition, its replies); ``parts`` as in `Engine.stream`."""
        ...


def collect(speak: Streaming, prompts: Sequence[Prompt], conditions: Sequence[Condition]) -> list[Generation]:
    """All replies, condition by condition."""
    found = dict(speak.stream(prompts, conditions, check_parts(None, len(conditions), len(prompts))))
    return [generation for c in range(len(conditions)) for generation in found[c]]


@dataclass(frozen=True, kw_only=True)
class EngineSpeaker:
    """An engine with its settings bound: base (``adapter`` None) or tuned, greedily."""

    engine: Engine
    adapter: str | None
    max_new_tokens: int
    progress: bool = True

    def __call__(self, prompts: Sequence[Prompt], conditions: Sequence[Condition], /) -> list[Generation]:
        return collect(self, prompts, conditions)

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], parts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        """See `Streaming.stream`."""
        return self.engine.stream(
            prompts,
            conditions=conditions,
            parts=parts,
            adapter=self.adapter,
            max_new_tokens=self.max_new_tokens,
            progress=self.progress,
        )


def replies(
    speak: Speaker, prompts: Sequence[Prompt], conditions: Sequence[Condition], parts: Sequence[Sequence[int]]
) -> Iterator[tuple[int, list[Generation]]]:
    """Each condition's replies to its part of the prompts. A speaker that cannot stream is called once for conditions with equal parts."""
    if isinstance(speak, Streaming):
        yield from speak.stream(prompts, conditions, parts)
        return
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for c, part in enumerate(parts):
        groups[tuple(part)].append(c)
    for part, members in groups.items():
        generations = speak([prompts[i] for i in part], [conditions[c] for c in members])
        for place, c in enumerate(members):
            yield c, generations[place * len(part) : (place + 1) * len(part)]


def speakers(model: Model, *, max_new_tokens: int, batch_size: int | None, progress: bool = True) -> tuple[Speaker, Speaker]:
    """(base, tuned): who replies in stages 2 and 3 and in evaluation, greedily; the same code with the adapter off and on.

    "Tuned" is the model as it stands when it speaks: its active adapter, or base where it has none.
    """
    return (
        ModelSpeaker(model=model, base=True, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress),
        ModelSpeaker(model=model, base=False, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelSpeaker:
    """A model that speaks as it stands, or as base; see `Streaming`."""

    model: Model
    base: bool
    max_new_tokens: int
    batch_size: int | None = None
    progress: bool = True

    def __call__(self, prompts: Sequence[Prompt], conditions: Sequence[Condition], /) -> list[Generation]:
        return collect(self, prompts, conditions)

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], parts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        """See `Streaming.stream`."""
        engine = TransformerLensEngine(self.model, batch_size=self.batch_size)
        adapter = BASE if self.base else (self.model.active_adapter or BASE)
        speaker = EngineSpeaker(engine=engine, adapter=adapter, max_new_tokens=self.max_new_tokens, progress=self.progress)
        return speaker.stream(prompts, conditions, parts)


_SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT, ids TEXT, truncated INTEGER)"


class ReplyStore:
    """A SQLite file of replies by key. Every ``put`` is on disk, whole, when it returns; several processes may share the file.

    Raises:
        ValueError: the file is no such store, damaged, or of another version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.connection = open_database(path, _SCHEMA, what="store of replies")

    def get(self, keys: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...], bool]]:
        """(reply, its token ids, whether it was truncated) of those keys that are there."""
        wanted, found = list(dict.fromkeys(keys)), {}
        for start in range(0, len(wanted), 500):
            part = wanted[start : start + 500]
            rows = self.connection.execute(
                f"SELECT key, reply, ids, truncated FROM replies WHERE key IN ({','.join('?' * len(part))})", part
            )
            found |= {key: (reply, tuple(json.loads(ids)), bool(truncated)) for key, reply, ids, truncated in rows}
        return found

    def put(self, generations: Iterable[tuple[str, Generation]]) -> None:
        """Keep replies under their keys, all of them or none; the first one stays where there is one already."""
        rows = [(key, g.reply, json.dumps(g.reply_ids), int(g.truncated)) for key, g in generations]
        insert_all(self.connection, "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", rows)

    def __len__(self) -> int:
        return int(self.connection.execute("SELECT COUNT(*) FROM replies").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self.connection.close()


@dataclass(frozen=True, kw_only=True, eq=False)
class RememberedSpeaker:
    """A speaker that never says the same thing twice: it looks replies up, asks for those that are missing, and keeps each condition's
    replies before the next condition is taken from the speaker.

    identity: of all that its replies depend on besides steering and prompt; see `identity_of`.
    """

    speaker: Speaker
    store: ReplyStore
    identity: str

    def __call__(self, prompts: Sequence[Prompt], conditions: Sequence[Condition], /) -> list[Generation]:
        return collect(self, prompts, conditions)

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], parts: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        """See `Streaming.stream`."""
        keys = [{p: self.key(condition, prompts[p]) for p in part} for condition, part in zip(conditions, parts, strict=True)]
        known = self.store.get(key for of_condition in keys for key in of_condition.values())
        there: list[dict[int, Generation]] = []
        for condition, of_condition in zip(conditions, keys, strict=True):
            found = {p: known[key] for p, key in of_condition.items() if key in known}
            there.append(
                {
                    p: Generation(prompt=prompts[p], condition=condition.name, reply=reply, reply_ids=ids, truncated=truncated)
                    for p, (reply, ids, truncated) in found.items()
                }
            )
        asked = []
        for c, part in enumerate(parts):
            if len(there[c]) < len(part):
                asked.append(c)
            else:
                yield c, [there[c][p] for p in part]
        if not asked:
            return
        missing = [[p for p in parts[c] if p not in there[c]] for c in asked]
        for i, generations in replies(self.speaker, prompts, [conditions[c] for c in asked], missing):
            c = asked[i]
            there[c] |= dict(zip(missing[i], generations, strict=True))
            self.store.put((keys[c][p], there[c][p]) for p in missing[i])
            yield c, [there[c][p] for p in parts[c]]

    def key(self, condition: Condition, prompt: Prompt) -> str:
        """Identity of one reply."""
        parts = (self.identity, condition.fingerprint, prompt.text, prompt.system)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def identity_of(engine: Engine, adapter: str | None, **decoding: Any) -> str:
    """Identity of what an engine's replies depend on: weights, adapter, chat template, engine, and the decoding settings.

    Raises ValueError for an engine that cannot say which weights it runs.
    """
    if isinstance(engine, TransformerLensEngine):
        who = model_identity(engine.model, adapter)
    elif isinstance(engine, Identified):
        who = engine.identity(adapter)
    else:
        raise ValueError(
            f"engine {engine.name!r} cannot say which weights it runs, so its replies cannot be kept: give it identity(adapter), or pass "
            "no store"
        )
    return of_value({"engine": engine.name, "who": who, "decoding": decoding})


def model_identity(model: Model, adapter: str | None) -> str:
    """Identity of a loaded model as ``adapter`` (None: base): its weights, the adapter's and their strength, and the tokenizer."""
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


def write_manifest(folder: Path, settings: dict[str, Any]) -> Path:
    """Note in ``folder`` what a run was set up as, with versions; one file for each different set-up, however often it is started."""
    about = {"settings": settings, "environment": files.environment()}
    path = folder / f"run-{of_value(about)[:12]}.json"
    if not path.exists():
        files.write_json(path, {"first_started": datetime.now(timezone.utc).isoformat(timespec="seconds"), **about})
    return path
