"""Stages 1 to 3 in a row: from a tuned model to its latent set. Any stage can also be called alone; this is their composition."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from sae_lens import SAE

from blockem_tl import records
from blockem_tl.calibration import EXTENDED_GRID, GRID, Budget, Calibrated, Selection, calibrate, select
from blockem_tl.conditions import UNSTEERED, Condition, Engine
from blockem_tl.diffing import candidate_pool, shifts
from blockem_tl.generation import TransformerLensEngine
from blockem_tl.judging import VerdictStore, remembered
from blockem_tl.latents import LatentSet
from blockem_tl.models import Model
from blockem_tl.outcomes import Arms, EngineSpeaker, Speaker, both_arms, collect
from blockem_tl.prompts import check_prompts, encode_examples, encode_prompts
from blockem_tl.replies import RememberedSpeaker, ReplyStore, identity_of, write_manifest
from blockem_tl.saes import check_fits, check_latents, fingerprint
from blockem_tl.screening import Screened, Shortlisting, screen, shortlist
from blockem_tl.types import Candidate, Example, Generation, Judge, Prompt


@dataclass(frozen=True, kw_only=True)
class DiscoveryConfig:
    """Hyperparameters of stages 1 to 3; the defaults are the paper's (Table 1, B.2, D.4).

    read: "prompts" measures shifts on the prompts alone, "replies" on each prompt with the tuned model's reply (the same text for both).
    batch_size: rows that run at once on the model itself; None asks the free memory.
    full_grid: ask every condition of stages 2 and 3 on every prompt (for figures), instead of stopping as soon as the latent set is
        certain. The latent set is the same.
    """

    n_plus: int = 250
    n_minus: int = 250
    read: Literal["prompts", "replies"] = "prompts"
    induce_dose: float = 0.7
    repair_dose: float = 0.4
    keep: int = 40
    rank_by: Literal["both", "induction"] = "both"
    grid: tuple[float, ...] = GRID
    extended_grid: tuple[float, ...] = EXTENDED_GRID
    promising: float = 0.042
    budget: Budget = field(default_factory=Budget)
    n_latents: int = 20
    rule: Literal["both", "repair"] = "repair"
    valid_only: bool = True
    max_new_tokens: int = 200
    batch_size: int | None = None
    full_grid: bool = False


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """The latent set and how it came about: the shifts' candidates, the screen and the calibration, for tables and figures."""

    latent_set: LatentSet
    screened: list[Screened]
    calibrated: list[Calibrated]

    def frame(self) -> pd.DataFrame:
        """One row per calibrated latent: shift, sign, screen score, largest feasible doses, effects, whether it is in K.

        ``abandoned`` latents could not reach K any more when measuring stopped: what was not certain by then is missing, and ``at_most``
        is the most that their score could have been.
        """
        screen_score = {s.candidate.latent: s.score for s in self.screened if s.abandoned_for is None}
        return pd.DataFrame(
            {
                "latent": c.candidate.latent,
                "shift": c.candidate.shift,
                "sign": c.candidate.sign,
                "screen_score": screen_score[c.candidate.latent],
                "induce_dose": c.induce.dose,
                "induction": c.induction_effect,
                "repair_dose": c.repair.dose,
                "repair": c.repair_effect,
                "in_k": c.candidate.latent in self.latent_set.latents,
                "abandoned": c.abandoned_for is not None,
                "at_most": c.at_most,
            }
            for c in self.calibrated
        )

    def screen_frame(self) -> pd.DataFrame:
        """One row per candidate of stage 2: effects, score (missing where it was abandoned), and the most that it could have been."""
        return pd.DataFrame(
            {
                "latent": s.candidate.latent,
                "shift": s.candidate.shift,
                "sign": s.candidate.sign,
                "induced_judged": s.induced.n,
                "repaired_judged": s.repaired.n,
                "induction": s.induction,
                "repair": s.repair,
                "score": None if s.abandoned_for else s.score,
                "abandoned": s.abandoned_for is not None,
                "at_most": s.at_most,
            }
            for s in self.screened
        )

    def dose_frame(self) -> pd.DataFrame:
        """One row per condition of stage 3 that was asked: counts of the judged replies, and whether all were asked (full_grid: all)."""
        return pd.DataFrame(
            {
                "latent": c.candidate.latent,
                "arm": seen.arm,
                "dose": seen.dose,
                **asdict(seen.counts),
                "asked": seen.asked,
                "complete": seen.asked == seen.of,
            }
            for c in self.calibrated
            for seen in c.seen
        )


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
    """A model that speaks as it stands, or as base; see :class:`blockem_tl.outcomes.Streaming`."""

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
        """See :meth:`blockem_tl.outcomes.Streaming.stream`."""
        engine = TransformerLensEngine(self.model, batch_size=self.batch_size)
        adapter = None if self.base else self.model.active_adapter
        speaker = EngineSpeaker(engine=engine, adapter=adapter, max_new_tokens=self.max_new_tokens, progress=self.progress)
        return speaker.stream(prompts, conditions, parts)


def _engine_speakers(engine: Engine, adapter: str | None, max_new_tokens: int) -> tuple[EngineSpeaker, EngineSpeaker]:
    if adapter is None:
        raise ValueError("discover: expected a model with an active adapter, got base: add, train or load one first")
    base, tuned = (EngineSpeaker(engine=engine, adapter=name, max_new_tokens=max_new_tokens, progress=False) for name in (None, adapter))
    return base, tuned


def _remembering(folder: Path, base: EngineSpeaker, tuned: EngineSpeaker, judge: Judge) -> tuple[Speaker, Speaker, Judge]:
    """The same speakers and judge, with all that they say kept in ``folder``."""
    records.check_writable(folder)
    replies, verdicts = ReplyStore(folder / "replies.sqlite"), VerdictStore(folder / "verdicts.sqlite")
    kept = [
        RememberedSpeaker(
            speaker=speaker, store=replies, identity=identity_of(speaker.engine, speaker.adapter, max_new_tokens=speaker.max_new_tokens)
        )
        for speaker in (base, tuned)
    ]
    return kept[0], kept[1], remembered(judge, verdicts)


def stage_two(
    arms: Arms, sae: SAE[Any], pool: Sequence[Candidate], config: DiscoveryConfig, *, scale: float, progress: bool = True
) -> list[Screened]:
    """:func:`blockem_tl.screening.screen` of the candidates as ``config`` says."""
    return screen(
        arms,
        sae,
        pool,
        scale=scale,
        induce_dose=config.induce_dose,
        repair_dose=config.repair_dose,
        shortlisting=Shortlisting(keep=config.keep, rank_by=config.rank_by),
        full_grid=config.full_grid,
        progress=progress,
    )


def stage_three(
    arms: Arms, sae: SAE[Any], screened: Sequence[Screened], config: DiscoveryConfig, *, scale: float, progress: bool = True
) -> list[Calibrated]:
    """:func:`blockem_tl.calibration.calibrate` of the shortlist as ``config`` says."""
    return calibrate(
        arms,
        sae,
        shortlist(screened, keep=config.keep, rank_by=config.rank_by),
        scale=scale,
        grid=config.grid,
        extended_grid=config.extended_grid,
        promising=config.promising,
        budget=config.budget,
        selection=Selection(n=config.n_latents, rule=config.rule, valid_only=config.valid_only),
        full_grid=config.full_grid,
        progress=progress,
    )


def chosen_by(config: DiscoveryConfig, calibrated: Sequence[Calibrated]) -> list[Calibrated]:
    """K: :func:`blockem_tl.calibration.select` as ``config`` says."""
    return select(calibrated, n=config.n_latents, rule=config.rule, valid_only=config.valid_only)


def discover(
    model: Model,
    sae: SAE[Any],
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    scale: float,
    config: DiscoveryConfig = DiscoveryConfig(),
    exclude: Sequence[int] = (),
    provenance: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    adapter: str | None = None,
    store: Path | str | None = None,
    progress: bool = True,
) -> Discovery:
    """Find the latents that causally carry what fine-tuning did to ``model`` (its active adapter).

    Args:
        prompts: the core prompts; they select, and must never report.
        scale: the site's median norm on base (:func:`blockem_tl.scale.median_norm`).
        exclude: latents to leave out, for instance those already blocked.
        provenance: what else to write into the latent set, for people: the training domain, the seed.
        engine: who replies in stages 2 and 3, for instance a vLLM engine; None is ``model`` itself. Stage 1 always reads ``model``.
        adapter: the name by which the engine knows the tuned model; it must hold the same weights as the active adapter.
        store: a folder in which every reply and verdict is kept as soon as it is there. A run that was killed goes on where it was when it
            is started again, and any other run reuses what is the same in it; a manifest of each set-up lies beside them.

    Raises:
        ValueError: bad prompts, an SAE that does not fit, a model without an active adapter, or no latent that qualifies.
    """
    check_prompts(prompts)
    check_fits(sae, model)
    check_latents(sae, exclude)
    if (engine is None) != (adapter is None):
        raise ValueError("discover: expected engine and adapter together: adapter is the name by which the engine knows the tuned model")
    engine = engine or TransformerLensEngine(model, batch_size=config.batch_size)
    base, tuned = _engine_speakers(engine, adapter or model.active_adapter, config.max_new_tokens)
    if store is not None:
        base, tuned, judge = _remembering(Path(store), base, tuned, judge)
        settings = {"config": asdict(config), "scale": scale, "exclude": list(exclude), "model": model.source, "judge": judge.name}
        write_manifest(Path(store), {**settings, "engine": engine.name, "sae": fingerprint(sae), "prompts": [p.text for p in prompts]})
    rows = encode_prompts(model.tokenizer, prompts)
    if config.read == "replies":
        replies = tuned(prompts, [UNSTEERED])
        rows = encode_examples(
            model.tokenizer,
            [Example(id=g.prompt.id, prompt=g.prompt.text, completion=g.reply, system=g.prompt.system) for g in replies if g.reply],
        )
    shift = shifts(model, sae, rows)
    shift[list(exclude)] = 0.0
    arms = both_arms(base, tuned, judge, prompts)
    screened = stage_two(
        arms, sae, candidate_pool(shift, n_plus=config.n_plus, n_minus=config.n_minus), config, scale=scale, progress=progress
    )
    calibrated = stage_three(arms, sae, screened, config, scale=scale, progress=progress)
    chosen = chosen_by(config, calibrated)
    latent_set = LatentSet.of(
        sae,
        [c.candidate for c in chosen],
        [c.score(config.rule) for c in chosen],
        prompts=prompts,
        provenance={
            **(provenance or {}),
            "method": "discovery",
            "model": model.source,
            "adapter": model.active_adapter,
            "judge": judge.name,
            "scale": scale,
            "config": asdict(config),
        },
    )
    return Discovery(latent_set=latent_set, screened=screened, calibrated=calibrated)
