"""Stages 1 to 3 on contrastive pairs: no generation and no judge, and blocks below the site run once for all conditions.

What a judge's rates are in the paper, mean margins are here (nats per token, see `preference`): a latent induces if it raises base's
margin, and repairs if it lowers tuned's. A pair counts as incoherent if steering makes its two answers less likely by more than
``max_incoherence.nats`` on average: a broken model finds everything unlikely.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from sae_lens import SAE

from blockem_tl.data.pair_files import check_pairs
from blockem_tl.discovery.attributing import PairDiff, pair_diff
from blockem_tl.discovery.calibration import NO_FEASIBLE_DOSE, Calibrated, FeasibleDose
from blockem_tl.discovery.config import DiscoveryConfig
from blockem_tl.discovery.diffing import candidate_pool
from blockem_tl.discovery.racing import DoseCounts
from blockem_tl.discovery.screening import Screened
from blockem_tl.discovery.stages import shortlisted
from blockem_tl.evaluation.preference import preference
from blockem_tl.generation.steering import UNSTEERED, Condition, Steering
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.saes.load import site_of
from blockem_tl.types import Candidate, Counts, Pair, Prompt
from blockem_tl.views.progress import progress_bar

Test = Literal["induce", "repair"]
TESTS: tuple[Test, Test] = ("induce", "repair")
MOST_CONDITIONS = 64
"""Conditions per pass over the pairs: progress is seen, and nothing large is held."""


def pairs_of(judge: object) -> list[Pair] | None:
    """The pairs, if pairs were given in the place of a judge; None for anything else."""
    if isinstance(judge, (list, tuple)) and judge and all(isinstance(one, Pair) for one in judge):
        return list(judge)
    return None


def questions(pairs: Sequence[Pair]) -> list[Prompt]:
    """The pairs' questions."""
    return [Prompt(id=pair.id, text=pair.prompt, category=pair.category, system=pair.system) for pair in pairs]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What one condition did: the effect in nats per token (eq. 7 and 9's brackets), and counts of pairs."""

    effect: float
    counts: Counts


class PairTests:
    """Base steered to be worse ("induce") or tuned steered to be better ("repair"), measured on pairs."""

    def __init__(self, model: Model, sae: SAE[Any], pairs: Sequence[Pair], adapter: str, scale: float, nats: float) -> None:
        check_pairs(pairs)
        self.model, self.sae, self.pairs, self.scale, self.nats = model, sae, list(pairs), scale, nats
        self.weights = {"induce": BASE, "repair": adapter}
        self.before = {test: preference(model, self.pairs, adapter=self.weights[test], progress=False) for test in TESTS}

    def unsteered(self, test: Test) -> Counts:
        """Counts without steering."""
        return self._counts(test, self.before[test].margins[0], self.before[test].levels[0])

    def measure(self, test: Test, steered: Sequence[tuple[int, float]], progress: bool, what: str) -> list[Effect]:
        """The effects of steering along latents' decoder rows at signed doses."""
        rows = decoder_directions(self.sae, [latent for latent, _ in steered]) if steered else ()
        made = [
            Condition(
                name=f"latent {latent} at {dose:+g}",
                steering=(Steering(site=site_of(self.sae), direction=row, dose=dose, scale=self.scale),),
            )
            for (latent, dose), row in zip(steered, rows, strict=True)
        ]
        found, adapter = list[Effect](), self.weights[test]
        with progress_bar(total=len(made), desc=f"{what}: {test}", show=progress) as bar:
            for start in range(0, len(made), MOST_CONDITIONS):
                part = made[start : start + MOST_CONDITIONS]
                seen = preference(self.model, self.pairs, adapter=adapter, conditions=[UNSTEERED, *part], progress=False)
                found += [self._effect(test, seen.margins[i], seen.levels[i]) for i in range(1, len(part) + 1)]
                bar.update(len(part))
        return found

    def _effect(self, test: Test, margins: np.ndarray, levels: np.ndarray) -> Effect:
        moved = float((margins - self.before[test].margins[0]).mean())
        return Effect(effect=moved if test == "induce" else -moved, counts=self._counts(test, margins, levels))

    def _counts(self, test: Test, margins: np.ndarray, levels: np.ndarray) -> Counts:
        broken = levels < self.before[test].levels[0] - self.nats
        return Counts(n=len(margins), misaligned=int((margins > 0).sum()), incoherent=int(broken.sum()), refusal=0)


def pool(diff: PairDiff, config: DiscoveryConfig, known: Sequence[int]) -> list[Candidate]:
    """C+ and C- by the shift (eq. 5), or by attribution: the changes that raised the margin most."""
    shift, estimate = diff.shift.clone(), diff.attribution.clone()
    shift[list(known)] = 0.0
    estimate[list(known)] = 0.0
    if config.candidates_by == "shift":
        return candidate_pool(shift, n_plus=config.n_plus, n_minus=config.n_minus)
    ranked = [k for k in estimate.argsort(descending=True, stable=True).tolist() if estimate[k] > 0 and shift[k] != 0]
    plus = [k for k in ranked if shift[k] > 0][: config.n_plus]
    minus = [k for k in ranked if shift[k] < 0][: config.n_minus]
    return [Candidate(latent=k, shift=float(shift[k])) for k in [*plus, *minus]]


def stages(
    model: Model,
    sae: SAE[Any],
    pairs: Sequence[Pair],
    adapter: str,
    config: DiscoveryConfig,
    known: Sequence[int],
    scale: float,
    progress: bool,
    given: Sequence[Candidate] | None = None,
) -> tuple[list[Screened], list[Calibrated]]:
    """Stages 1 to 3 as `discover` runs them, on pairs; of candidates that are given only stage 3."""
    tests = PairTests(model, sae, pairs, adapter, scale, config.max_incoherence.nats)
    if given is not None:
        return [], calibrate_pairs(tests, given, config, progress=progress)
    chosen = pool(pair_diff(model, sae, pairs, adapter=adapter, progress=progress), config, known)
    screened = screen_pairs(tests, chosen, config, progress=progress)
    return screened, calibrate_pairs(tests, shortlisted(screened, config), config, progress=progress)


def screen_pairs(tests: PairTests, candidates: Sequence[Candidate], config: DiscoveryConfig, *, progress: bool = True) -> list[Screened]:
    """Stage 2 on pairs: every candidate at the screen's doses, both ways. Raises NoLatents without a candidate."""
    if not candidates:
        raise NoLatents("screen: expected candidates from stage 1, got none: did fine-tuning move no latent?")
    doses = {"induce": config.induce_dose, "repair": -config.repair_dose}
    induced, repaired = (tests.measure(test, [(c.latent, c.sign * doses[test]) for c in candidates], progress, "screen") for test in TESTS)
    return [
        Screened(candidate=c, induced=up.counts, repaired=down.counts, induction=up.effect, repair=down.effect)
        for c, up, down in zip(candidates, induced, repaired, strict=True)
    ]


def calibrate_pairs(
    tests: PairTests, candidates: Sequence[Candidate], config: DiscoveryConfig, *, progress: bool = True
) -> list[Calibrated]:
    """Stage 3 on pairs: for every latent and direction the largest dose of its grid within the limit on incoherence (eq. 8)."""
    grids = {c.latent: _grid(c, config) for c in candidates}
    found = [
        Calibrated(candidate=c, induce=NO_FEASIBLE_DOSE, repair=NO_FEASIBLE_DOSE, induction_effect=None, repair_effect=None)
        for c in candidates
    ]
    for test in TESTS:
        sign = 1 if test == "induce" else -1
        asked = [(c.latent, sign * c.sign * dose) for c in candidates for dose in grids[c.latent] if dose > 0]
        effects = dict(zip(asked, tests.measure(test, asked, progress, "calibrate"), strict=True))
        found = [_with_test(one, test, tests, grids[one.candidate.latent], sign, effects, config) for one in found]
    return found


def _grid(candidate: Candidate, config: DiscoveryConfig) -> list[float]:
    far = abs(candidate.shift) >= config.extended_grid_min_shift
    return sorted({*config.grid, *(config.extended_grid if far else ())}, reverse=True)


def _with_test(
    found: Calibrated,
    test: Test,
    tests: PairTests,
    grid: Sequence[float],
    sign: int,
    effects: dict[tuple[int, float], Effect],
    config: DiscoveryConfig,
) -> Calibrated:
    """The calibrated latent with the results of one more test."""
    candidate, n = found.candidate, len(tests.pairs)
    none = Effect(effect=0.0, counts=tests.unsteered(test))  # dose 0
    at = {sign * candidate.sign * dose: effects.get((candidate.latent, sign * candidate.sign * dose), none) for dose in grid}
    tried = tuple(DoseCounts(test=test, dose=dose, counts=one.counts, asked=n, of=n) for dose, one in at.items() if dose)
    feasible = (dose for dose, one in at.items() if config.max_incoherence.allows(one.counts, none.counts))
    best = next(feasible, None)  # the grid runs downwards
    if best is None:
        return replace(found, doses=(*found.doses, *tried))
    known = {test: FeasibleDose(dose=best, counts=at[best].counts), f"{_NOUN[test]}_effect": at[best].effect}
    return replace(found, doses=(*found.doses, *tried), **cast(Any, known))


_NOUN = {"induce": "induction", "repair": "repair"}
