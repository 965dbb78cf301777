"""Stages 1 to 3 in a row: from a tuned model to its latent set. Any stage can also be called alone; this is their composition."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from sae_lens import SAE

from blockem_tl.data.chat import encode_examples, encode_prompts
from blockem_tl.data.checks import check_prompts
from blockem_tl.discovery.calibration import Calibrated, Selection, calibrate, select
from blockem_tl.discovery.config import PAPER, DiscoveryConfig
from blockem_tl.discovery.diffing import candidate_pool, shifts
from blockem_tl.discovery.racing import Arms, both_arms
from blockem_tl.discovery.screening import Screened, Shortlisting, screen, shortlist
from blockem_tl.generation.engine import Engine, TransformerLensEngine
from blockem_tl.generation.replies import EngineSpeaker, RememberedSpeaker, ReplyStore, Speaker, identity_of, write_manifest
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.judging.cached import CachedJudge
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import check_latents
from blockem_tl.saes.load import check_fits, fingerprint
from blockem_tl.storage import files
from blockem_tl.storage.store import Store
from blockem_tl.types import Candidate, Example, Judge, Prompt


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


def _engine_speakers(engine: Engine, adapter: str | None, max_new_tokens: int) -> tuple[EngineSpeaker, EngineSpeaker]:
    if adapter is None:
        raise ValueError("discover: expected a model with an active adapter, got base: add, train or load one first")
    base, tuned = (EngineSpeaker(engine=engine, adapter=name, max_new_tokens=max_new_tokens, progress=False) for name in (BASE, adapter))
    return base, tuned


def _remembering(folder: Path, base: EngineSpeaker, tuned: EngineSpeaker, judge: Judge) -> tuple[Speaker, Speaker, Judge]:
    """The same speakers and judge, with all that they say kept in ``folder``."""
    files.check_writable(folder)
    replies = ReplyStore(folder / "replies.sqlite")
    kept = [
        RememberedSpeaker(
            speaker=speaker, store=replies, identity=identity_of(speaker.engine, speaker.adapter, max_new_tokens=speaker.max_new_tokens)
        )
        for speaker in (base, tuned)
    ]
    cached = judge if isinstance(judge, CachedJudge) else CachedJudge(judge=judge, store=Store(folder / "verdicts.sqlite"))
    return kept[0], kept[1], cached


def stage_two(
    arms: Arms, sae: SAE[Any], pool: Sequence[Candidate], config: DiscoveryConfig, *, scale: float, progress: bool = True
) -> list[Screened]:
    """`screen` of the candidates as ``config`` says."""
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
    """`calibrate` of the shortlist as ``config`` says."""
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
    """K: `select` as ``config`` says."""
    return select(calibrated, n=config.n_latents, rule=config.rule, valid_only=config.valid_only)


def discover(
    model: Model,
    sae: SAE[Any],
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    scale: float,
    config: DiscoveryConfig = PAPER,
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
        scale: the site's median norm on base (`median_norm`).
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
