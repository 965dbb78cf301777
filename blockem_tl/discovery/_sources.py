"""The replies and verdicts that discovery asks for, kept in a folder if there is one: a run that was killed goes on from them."""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from blockem_tl.discovery.config import DiscoveryConfig
from blockem_tl.generation.engine import Engine
from blockem_tl.generation.reply_fn import ReplyFn, cached, replies_from
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.storage import files, fingerprints, machine
from blockem_tl.storage.store import Store
from blockem_tl.types import Judge


def sources(
    model: Model,
    engine: Engine | None,
    judge: Judge,
    adapter: str,
    config: DiscoveryConfig,
    store: Path | str | None,
    about: dict[str, Any],
) -> tuple[ReplyFn, ReplyFn, Judge]:
    """Base's replies, tuned's replies and the judge; with a store, all of them kept there."""
    base, tuned = (
        replies_from(engine or model, adapter=name, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, progress=False)
        for name in (BASE, adapter)
    )
    if store is None:
        return base, tuned, judge
    folder = files.check_writable(store)
    kept = Store(folder / "store.sqlite")
    _write_manifest(folder, {**about, "engine": base.engine.name})
    kept_judge = judge if isinstance(judge, CachedJudge) else CachedJudge(judge=judge, store=kept)
    return cached(base, kept), cached(tuned, kept), kept_judge


def _write_manifest(folder: Path, settings: dict[str, Any]) -> Path:
    """Note in ``folder`` how a run was set up, with versions; one file for each different set-up, however often it is started."""
    about = {"settings": settings, "environment": machine.described()}
    path = folder / f"run-{fingerprints.of_value(about)[:12]}.json"
    if not path.exists():
        files.write_json(path, {"first_started": datetime.now(timezone.utc).isoformat(timespec="seconds"), **about})
    return path
