"""`discover`: stages 1 to 3 in a row, from a tuned model to its latent set. Each stage can also be called alone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from sae_lens import SAE

from blockem_tl.data.checks import check_prompts
from blockem_tl.discovery import by_pairs
from blockem_tl.discovery._sources import sources
from blockem_tl.discovery.by_pairs import pairs_of
from blockem_tl.discovery.calibration import Calibrated
from blockem_tl.discovery.config import PAPER, DiscoveryConfig, checked_scale, warn_if_nothing_induced
from blockem_tl.discovery.diffing import candidate_pool, shifts
from blockem_tl.discovery.racing import steering_tests
from blockem_tl.discovery.screening import Screened
from blockem_tl.discovery.shortlists import united
from blockem_tl.discovery.stages import chosen_by, shortlisted, stage_three, stage_two
from blockem_tl.generation.engine import Engine
from blockem_tl.generation.reply_fn import ReplyFn
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.models.activations import median_norm
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.fit import warn_if_poor_fit
from blockem_tl.saes.latent_set import LatentSet, NoLatents
from blockem_tl.saes.latents import check_latents
from blockem_tl.saes.load import check_fits
from blockem_tl.types import Candidate, Example, Judge, Pair, Prompt
from blockem_tl.views.results import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class Discovery(Result):
    """A latent set with the measurements that chose it, for tables and figures.

    latent_set: K; under ``discover(extending=...)`` the extended set.  added: what this run found, K or K_reem.
    screened, calibrated: the candidates of stages 2 and 3; none of stage 2 under ``discover(among=...)``.
    """

    latent_set: LatentSet
    added: LatentSet
    screened: list[Screened]
    calibrated: list[Calibrated]

    def to_frame(self) -> pd.DataFrame:
        """One row per calibrated latent: shift, sign, screen score, largest feasible doses, effects, whether it is in K.

        Doses here are each latent's own largest feasible ones, signed, not those of the configuration.
        ``abandoned`` latents could not reach K any more when measuring stopped: what was not certain by then is missing, and ``at_most``
        is the most that their score could have been.
        """
        screen_score = {s.candidate.latent: s.score for s in self.screened if s.abandoned_for is None}
        return pd.DataFrame(
            {
                "latent": c.candidate.latent,
                "shift": c.candidate.shift,
                "sign": c.candidate.sign,
                "screen_score": screen_score.get(c.candidate.latent),
                "induce_dose": c.induce.dose,
                "induction": c.induction_effect,
                "repair_dose": c.repair.dose,
                "repair": c.repair_effect,
                "in_k": c.candidate.latent in self.added.latents,
                "abandoned": c.abandoned_for is not None,
                "at_most": c.at_most,
            }
            for c in self.calibrated
        )

    def screen_frame(self) -> pd.DataFrame:
        """One row per candidate of stage 2: effects, score (missing if it was abandoned), and the most that it could have been."""
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
                "test": tried.test,
                "dose": tried.dose,
                **asdict(tried.counts),
                "asked": tried.asked,
                "complete": tried.asked == tried.of,
            }
            for c in self.calibrated
            for tried in c.doses
        )

    def headline(self) -> str:
        """Sizes of K and of what it was chosen from."""
        return f"{self.latent_set.headline()}; from {len(self.screened or self.calibrated)} candidates, {len(self.calibrated)} calibrated"

    def plot(self) -> Any:
        """Induction against repair of the calibrated latents, K marked."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.discovery(self.to_frame())


def discover(
    model: Model,
    sae: SAE[Any],
    judge: Judge | Sequence[Pair],
    prompts: Sequence[Prompt] | None = None,
    *,
    adapter: str | Path | None = None,
    scale: float | None = None,
    config: DiscoveryConfig = PAPER,
    extending: LatentSet | None = None,
    exclude: Sequence[int] = (),
    among: Sequence[LatentSet] | None = None,
    provenance: Mapping[str, Any] | None = None,
    engine: Engine | None = None,
    store: Path | str | None = None,
    progress: bool = True,
) -> Discovery:
    """The latents that causally carry what fine-tuning did to ``model``, by stages 1 to 3.

    Args:
        judge: grades the replies of stages 2 and 3; or contrastive pairs in its place: margins instead of rates, in minutes.
        prompts: the core prompts; they select, and must never report. With pairs, their own questions.
        adapter: the tuned model: an adapter by name or in a folder; None: the one that acts.
        scale: the site's median norm on base (`median_norm` over a reference corpus, as in the paper); None measures it on ``prompts``.
        extending: K of an earlier run (F.2), whose latents are no candidates; what is found is added to it.  exclude: more of these.
        among: shortlists whose union stage 3 ranks, in place of stages 1 and 2 (D.5).  provenance: further entries of the set's own.
        engine: makes the replies of stages 2 and 3; it holds the same weights under the adapter's name. None: ``model`` itself.
        store: a folder that keeps every reply and verdict as soon as it is there; a run that was killed goes on from them.

    Raises ValueError for bad prompts, an SAE that does not fit, no active adapter, or another SAE's latent set; NoLatents if none is left.
    """
    pairs = pairs_of(judge)
    prompts = _prompts(pairs, prompts, engine, store, config)
    known, given = _known(sae, extending, exclude, among)
    warn_if_poor_fit(model, sae, prompts, stacklevel=2)
    with _tuned(model, adapter) as name:
        scale = checked_scale(median_norm(model, check_fits(sae, model), prompts) if scale is None else scale)
        about = _about(model, name, judge, scale, config)
        if pairs is not None:
            screened, calibrated = by_pairs.stages(model, sae, pairs, name, config, known, scale, progress, given)
        else:
            by_judge = sources(model, engine, cast(Judge, judge), name, config, store, _asked(about, prompts, known, given))
            screened, calibrated = _stages(model, sae, prompts, by_judge, config, known, scale, progress, given)
    added = _latent_set(sae, calibrated, config, prompts, among or (), {**(provenance or {}), **about})
    return Discovery(latent_set=extending.extended_by(added) if extending else added, added=added, screened=screened, calibrated=calibrated)


def _known(
    sae: SAE[Any], extending: LatentSet | None, exclude: Sequence[int], among: Sequence[LatentSet] | None
) -> tuple[list[int], list[Candidate] | None]:
    """Latents that are no candidates, and the candidates of ``among`` without those. Raises ValueError for another SAE's, or bad ones."""
    if extending is not None:
        extending.check_sae(sae)
    known = [*(extending.latents if extending else ()), *exclude]
    check_latents(sae, known)
    if among is None:
        return known, None
    given = [c for c in united(sae, among) if c.latent not in known]
    if not given:
        raise NoLatents("discover: expected latents to choose among, got none beside those that are left out")
    return known, given


def _asked(about: Mapping[str, Any], prompts: Sequence[Prompt], known: Sequence[int], given: Sequence[Candidate] | None) -> dict[str, Any]:
    """What decides which replies are asked, for the store's manifest."""
    latents = None if given is None else [c.latent for c in given]
    return {**about, "exclude": list(known), "candidates": latents, "prompts": [p.text for p in prompts]}


def _prompts(
    pairs: Sequence[Pair] | None, prompts: Sequence[Prompt] | None, engine: Engine | None, store: Any, config: DiscoveryConfig
) -> Sequence[Prompt]:
    """The prompts that select. Raises ValueError for arguments that do not go together."""
    if pairs is not None:
        given = {"prompts": prompts, "engine": engine, "store": store}
        unused = [name for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"discover: contrastive pairs need no {', '.join(unused)}: their own answers are read, by the model itself")
        return by_pairs.questions(pairs)
    if prompts is None:
        raise ValueError("discover: expected the core prompts beside a judge; contrastive pairs in its place need none")
    if config.candidates_by != "shift":
        raise ValueError("discover: candidates_by='attribution' differentiates the margin of contrastive pairs: pass them as the judge")
    check_prompts(prompts)
    return prompts


@contextmanager
def _tuned(model: Model, adapter: str | Path | None) -> Iterator[str]:
    """Inside the block the tuned model acts; gives its adapter's name."""
    with model.holding(adapter) as held:
        name = held or model.active_adapter
        if name is None or name == BASE:
            raise ValueError(
                "discover: expected a model with an active adapter, got base: add, train or load one first, or pass adapter=..."
            )
        with model.using(name):
            yield name


def _about(model: Model, adapter: str, judge: Judge | Sequence[Pair], scale: float, config: DiscoveryConfig) -> dict[str, Any]:
    return {
        "method": "discovery",
        "model": model.name,
        "adapter": adapter,
        "judge": judge.name if isinstance(judge, Judge) else "contrastive pairs",
        "scale": scale,
        "config": asdict(config),
    }


def _stages(
    model: Model,
    sae: SAE[Any],
    prompts: Sequence[Prompt],
    sources: tuple[ReplyFn, ReplyFn, Judge],
    config: DiscoveryConfig,
    known: Sequence[int],
    scale: float,
    progress: bool,
    given: Sequence[Candidate] | None,
) -> tuple[list[Screened], list[Calibrated]]:
    base, tuned, judge = sources
    tests = steering_tests(base, tuned, judge, prompts, smallest_wave=config.smallest_wave)
    if given is not None:
        return [], stage_three(tests, sae, given, config, scale=scale, progress=progress)
    shift = shifts(model, sae, _rows(tuned, prompts, config))
    shift[list(known)] = 0.0
    pool = candidate_pool(shift, n_plus=config.n_plus, n_minus=config.n_minus)
    screened = stage_two(tests, sae, pool, config, scale=scale, progress=progress)
    return screened, stage_three(tests, sae, shortlisted(screened, config), config, scale=scale, progress=progress)


def _latent_set(
    sae: SAE[Any],
    calibrated: Sequence[Calibrated],
    config: DiscoveryConfig,
    prompts: Sequence[Prompt],
    among: Sequence[LatentSet],
    provenance: dict[str, Any],
) -> LatentSet:
    measured = [c.induction_effect for c in calibrated if c.abandoned_for is None]
    warn_if_nothing_induced(measured, f"discover: none of the {len(measured)} latents measured to the end", stacklevel=3)
    chosen = chosen_by(config, calibrated)
    doses = {str(c.candidate.latent): {"induce": c.induce.dose, "repair": c.repair.dose} for c in chosen}  # None: not measured to the end
    scores = [c.score(config.final_score) for c in chosen]
    found = LatentSet.of(sae, [c.candidate for c in chosen], scores, prompts=prompts, provenance={**provenance, "doses": doses})
    return replace(found, selection_prompts=tuple(sorted({*found.selection_prompts, *(one for k in among for one in k.selection_prompts)})))


def _rows(tuned: ReplyFn, prompts: Sequence[Prompt], config: DiscoveryConfig) -> Sequence[Prompt] | list[Example]:
    """The rows that stage 1 reads: prompts alone, or each prompt with the tuned model's reply."""
    if config.read == "prompts":
        return prompts
    replies = tuned(prompts, [UNSTEERED])
    return [Example(id=g.prompt.id, prompt=g.prompt.text, completion=g.reply, system=g.prompt.system) for g in replies if g.reply]
