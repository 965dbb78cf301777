"""Acting on re-emergence: find the latents that a re-emerged model uses besides K, block them too, and again (paper, section 5 and F.2)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from sae_lens import SAE

from blockem_tl.conditions import Engine
from blockem_tl.discovery import Discovery, DiscoveryConfig, discover
from blockem_tl.latents import LatentSet, NoLatents
from blockem_tl.models import Model
from blockem_tl.types import Judge, Prompt

PAPER = DiscoveryConfig()
Checkpoint = TypeVar("Checkpoint")


@dataclass(frozen=True, kw_only=True)
class Extension:
    """latent_set: K and then what was added, each latent with its own sign, shift and score.  added: the new latents alone (K_reem).

    A score is an effect on the model that its latent was found in: K's on the first fine-tune, K_reem's on the re-emerged one. The
    provenance keeps one entry per source under "of", with the latents that came from it.
    """

    latent_set: LatentSet
    added: LatentSet
    discovery: Discovery


def extend(
    latent_set: LatentSet,
    model: Model,
    sae: SAE[Any],
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    scale: float,
    config: DiscoveryConfig = PAPER,
    provenance: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    adapter: str | None = None,
    store: Path | str | None = None,
    progress: bool = True,
) -> Extension:
    """Run discovery against ``model`` as it stands (the re-emerged checkpoint), with ``latent_set`` kept out of the candidates.

    Args:
        prompts: the core prompts; the union remembers them beside those that chose ``latent_set``.
        config: of the discovery; ``config.n_latents`` is how many are added at most.
        scale, provenance, engine, adapter, store, progress: as for :func:`blockem_tl.discovery.discover`.

    Raises:
        ValueError: a set of another SAE, or what :func:`blockem_tl.discovery.discover` refuses.
        NoLatents: no further latent qualifies.
    """
    latent_set.check_sae(sae)
    found = discover(
        model,
        sae,
        judge,
        prompts,
        scale=scale,
        config=config,
        exclude=latent_set.latents,
        provenance=provenance,
        engine=engine,
        adapter=adapter,
        store=store,
        progress=progress,
    )
    return Extension(latent_set=joined(latent_set, found.latent_set), added=found.latent_set, discovery=found)


def joined(first: LatentSet, second: LatentSet) -> LatentSet:
    """Their union, whose provenance says which latents came from where."""
    sources = [source for part in (first, second) for source in _sources(part)]
    return replace(
        first.union(second), provenance={"method": "extension", "of": sources, "neuronpedia": first.provenance.get("neuronpedia")}
    )


def _sources(latent_set: LatentSet) -> list[dict[str, Any]]:
    if latent_set.provenance.get("method") == "extension":
        return [{**source, "latents": [k for k in source["latents"] if k in latent_set.latents]} for source in latent_set.provenance["of"]]
    return [{**latent_set.provenance, "latents": list(latent_set.latents)}]


# ------------------------------------------------------------------------------------------------ rounds


@dataclass(frozen=True, kw_only=True)
class Round(Generic[Checkpoint]):
    """What was blocked, what training with it ended in, and how much EM (a fraction) was there."""

    latent_set: LatentSet
    checkpoint: Checkpoint
    em: float


def extension_rounds(
    latent_set: LatentSet,
    *,
    train: Callable[[LatentSet], Checkpoint],
    measure: Callable[[Checkpoint], float],
    extend: Callable[[LatentSet, Checkpoint], LatentSet],
    budget: int,
    enough: float = 0.0,
) -> Iterator[Round[Checkpoint]]:
    """Block, train, measure; extend the set by what the result uses; train again from the start. Yields each round once it is measured.

    It ends when EM stays down, when ``budget`` latents are blocked, or when nothing more is found. The last round is the result.

    Args:
        train: from a latent set to whatever stands for the trained model: a folder, an adapter's name.
        measure: EM of that model, as a fraction, on prompts that may choose (it decides when to stop, so they must not report).
        extend: from the set and the model to a larger set that begins with it, see :func:`extend`. Of its latents the first that fit
            into the budget are taken.
        budget: how many latents may be blocked in all.
        enough: EM up to which it counts as down.

    Raises:
        ValueError: a budget below the set's size, ``enough`` outside [0, 1), an EM that is no fraction, or an extended set that does
            not begin with the set it extends.
    """
    if budget < len(latent_set) or not 0 <= enough < 1:
        raise ValueError(f"rounds: expected a budget of at least {len(latent_set)} latents and 0 <= enough < 1, got {budget} and {enough}")
    while True:
        checkpoint = train(latent_set)
        em = measure(checkpoint)
        if math.isnan(em) or not 0 <= em <= 1:
            raise ValueError(f"rounds: expected measure() to give a fraction of misaligned replies, got {em}")
        yield Round(latent_set=latent_set, checkpoint=checkpoint, em=em)
        if em <= enough or len(latent_set) == budget:
            return
        try:
            larger = extend(latent_set, checkpoint)
        except NoLatents:
            return
        if larger.latents[: len(latent_set)] != latent_set.latents:
            raise ValueError("rounds: expected extend() to keep the set's latents and add to their end, got another set")
        if len(larger) == len(latent_set):
            return
        latent_set = larger.first(min(budget, len(larger)))
