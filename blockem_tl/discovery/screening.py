"""Stage 2, the induce-and-repair screen: the moved latents that also move behaviour, both ways (paper A.3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from sae_lens import SAE

from blockem_tl.discovery.config import ScreenScore
from blockem_tl.discovery.racing import Bounds, ReplyProgress, SteeringTest, SteeringTests, Tally, beaten
from blockem_tl.generation.steering import Condition, Steering
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.saes.load import site_of
from blockem_tl.types import Candidate, Counts


@dataclass(frozen=True, kw_only=True)
class Shortlisting:
    """The shortlist that is wanted: the best ``size`` of C+ and the best of C-, by eq. 7 or (IndPP, eq. 12) by induction alone."""

    size: int = 40
    screen_score: ScreenScore = "both"

    @property
    def decisive(self) -> int:
        """Number of the two tests (induce, repair) the rank depends on."""
        return 2 if self.screen_score == "both" else 1


@dataclass(frozen=True, kw_only=True)
class Screened:
    """A candidate with the effects of constant-strength steering: base made worse (induction), tuned made better (repair), in [-1, 1].

    induced, repaired: counts of the judged replies.
    induction, repair: the effects; None if some replies were not judged.
    abandoned_for: the shortlist that this candidate could no longer reach, so that measuring stopped; None if it was measured whole.
    at_most: the most that an abandoned candidate's score could have been.
    """

    candidate: Candidate
    induced: Counts
    repaired: Counts
    induction: float | None
    repair: float | None
    abandoned_for: Shortlisting | None = None
    at_most: float | None = None

    @property
    def score(self) -> float:
        """Eq. 7. Raises ValueError for an abandoned candidate: its score was never measured."""
        if self.induction is None or self.repair is None:
            raise ValueError(
                f"latent {self.candidate.latent} was abandoned, its score is not known: see at_most, or screen with full_grid=True"
            )
        return self.induction + self.repair


def screen(
    tests: SteeringTests,
    sae: SAE[Any],
    candidates: Sequence[Candidate],
    *,
    scale: float,
    induce_dose: float = 0.7,
    repair_dose: float = 0.4,
    shortlisting: Shortlisting | None = None,
    full_grid: bool = False,
    progress: bool = True,
) -> list[Screened]:
    """Steer base with +sign * induce_dose and tuned with -sign * repair_dose along every candidate, and count what the judge says.

    Args:
        tests: the reply functions, the judge and the prompts: `steering_tests`.
        scale: the site's median norm s.
        shortlisting: stop measuring candidates that can no longer reach this shortlist; `shortlist` gives it exactly as it would be
            with all replies. None asks all.
        full_grid: ask all in any case.
    """
    if not candidates:
        raise NoLatents("screen: expected candidates from stage 1, got none: did fine-tuning move no latent?")
    if full_grid:
        shortlisting = None
    pair, n_prompts = (tests.induce, tests.repair), len(tests.induce.prompts)
    trials = []
    for c, direction in zip(candidates, decoder_directions(sae, [c.latent for c in candidates]), strict=True):
        steer = partial(Steering, site=site_of(sae), direction=direction, scale=scale)
        doses = (c.sign * induce_dose, -c.sign * repair_dose)
        named = [Condition(name=f"latent {c.latent} at {dose:+g}", steering=(steer(dose=dose),)) for dose in doses]
        trials.append(Trial(c, pair, [test.tally(condition) for test, condition in zip(pair, named, strict=True)]))
    bar = ReplyProgress("screen", 2 * len(trials) * n_prompts, progress)
    if shortlisting is not None:
        _race(trials, pair, shortlisting, bar)
    staying = [trial for trial in trials if not trial.abandoned]
    asked = [test.ask((t.tallies[a], t.tallies[a].missing(range(n_prompts))) for t in staying) for a, test in enumerate(pair)]
    bar.update(asked=sum(asked), open=0)
    bar.close()
    return [trial.result(shortlisting) for trial in trials]


class Trial:
    """A candidate that is being measured, with its tally on each test; ``abandoned`` once it can no longer reach the shortlist."""

    def __init__(self, candidate: Candidate, tests: Sequence[SteeringTest], tallies: Sequence[Tally]) -> None:
        self.candidate, self.tests, self.tallies = candidate, tests, tallies
        self.abandoned = False

    def left(self, decisive: int = 2) -> int:
        """Number of replies missing on the first ``decisive`` tests."""
        return sum(tally.left for tally in self.tallies[:decisive])

    def bounds(self, decisive: int) -> Bounds:
        """Bounds on the sum of the effects on the first ``decisive`` tests."""
        first, *rest = (tally.bounds(test.effect) for test, tally in zip(self.tests[:decisive], self.tallies, strict=False))
        return sum(rest, first)

    def result(self, shortlisting: Shortlisting | None) -> Screened:
        """The measured candidate."""
        counts = [tally.counts if tally.left else tally.if_rest("1") for tally in self.tallies]
        effects = [None if t.left else test.effect(n) for test, t, n in zip(self.tests, self.tallies, counts, strict=True)]
        return Screened(
            candidate=self.candidate,
            induced=counts[0],
            repaired=counts[1],
            induction=effects[0],
            repair=effects[1],
            abandoned_for=shortlisting if self.abandoned else None,
            at_most=self.bounds(shortlisting.decisive).high if shortlisting and self.abandoned else None,
        )


def _race(trials: Sequence[Trial], tests: Sequence[SteeringTest], shortlisting: Shortlisting, bar: ReplyProgress) -> None:
    """Ask in waves until every candidate has all replies on the decisive tests, or no way into the shortlist any more."""
    decisive = shortlisting.decisive
    teams = [[trial for trial in trials if trial.candidate.sign == sign] for sign in (1, -1)]
    while True:
        bounds = {trial: trial.bounds(decisive) for trial in trials}
        for team in teams:
            for trial, out in zip(team, beaten([bounds[trial] for trial in team], shortlisting.size), strict=True):
                trial.abandoned = out and trial.left() > 0
        racing = [trial for trial in trials if not trial.abandoned]
        bar.update(asked=0, open=sum(trial.left() for trial in racing), abandoned=len(trials) - len(racing))
        if not any(trial.left(decisive) for trial in racing):
            return
        futility = [test.futility() for test in tests[:decisive]]
        sizes = {trial: size for team in teams for trial, size in _sizes(team, bounds, shortlisting, futility).items()}
        wave = tests[0].enlarged([sizes[trial] for trial in racing])
        parts = {trial: _first(trial, futility, size) for trial, size in zip(racing, wave, strict=True)}
        if not any(any(map(len, part)) for part in parts.values()):  # by the bounds this cannot be; but the loop must end
            parts = {trial: _first(trial, futility, trial.left(decisive)) for trial in racing}
        asked = [test.ask((trial.tallies[a], part[a]) for trial, part in parts.items()) for a, test in enumerate(tests[:decisive])]
        bar.update(asked=sum(asked), open=sum(trial.left() for trial in racing))


def _first(trial: Trial, futility: Sequence[Float[np.ndarray, " n_prompts"]], size: int) -> list[list[int]]:
    """The next ``size`` prompts on all tests together, those first that lowered most bounds so far; sorted by test."""
    missing = [(-futility[a][i], a, i) for a in range(len(futility)) for i in trial.tallies[a].missing(range(len(futility[a])))]
    chosen = sorted(missing)[:size]
    return [[i for _, b, i in chosen if b == a] for a in range(len(futility))]


def _sizes(
    team: Sequence[Trial],
    bounds: Mapping[Trial, Bounds],
    shortlisting: Shortlisting,
    futility: Sequence[Float[np.ndarray, " n_prompts"]],
) -> dict[Trial, int]:
    """Number of replies to ask each candidate next: those that would final_score it out, were the last place's score as guessed."""
    if len(team) <= shortlisting.size:
        return {trial: trial.left(shortlisting.decisive) for trial in team}
    last = sorted((_guess(trial, bounds[trial].high, futility) for trial in team), reverse=True)[shortlisting.size - 1]
    n, sizes = len(futility[0]), {}
    for trial in team:
        gap = n * (bounds[trial].high - last)
        sizes[trial] = max(1, math.ceil(gap if gap <= n / 4 else gap / 2)) if gap >= 0 else 0
    return sizes


def _guess(trial: Trial, high: float, futility: Sequence[Float[np.ndarray, " n_prompts"]]) -> float:
    """A guess of a candidate's final score, at most ``high``: its missing replies go as the average candidate's on those prompts."""
    n, asked, missing, start = len(futility[0]), 0.0, 0.0, 0.0
    for rates, tally, test in zip(futility, trial.tallies, trial.tests, strict=False):
        unknown = float(rates[tally.missing(range(n))].sum())
        missing, asked, start = missing + unknown, asked + float(rates.sum()) - unknown, start + test.any_effect.high
    lost = n * (start - high) / asked if asked > 0.5 else 1.0
    return high - max(0.0, lost * missing / n)


def shortlist(screened: Sequence[Screened], *, size: int = 40, screen_score: ScreenScore = "both") -> list[Candidate]:
    """K-tilde: the best ``size`` of C+ and the best ``size`` of C-, by eq. 7 or (variant IndPP, eq. 12) by induction alone.

    Raises:
        ValueError: candidates were abandoned for another shortlist than this one.
    """
    for s in screened:
        known = s.abandoned_for
        if known is not None and (known.screen_score != screen_score or known.size < size):
            raise ValueError(
                f"shortlist: latent {s.candidate.latent} was abandoned while screening for {known}, so size={size}, "
                f"screen_score={screen_score!r} cannot be told: screen for that shortlist, or with full_grid=True"
            )
    there = [s for s in screened if s.abandoned_for is None]
    ranked = sorted(there, key=lambda s: s.score if screen_score == "both" else cast(float, s.induction), reverse=True)
    return [s.candidate for sign in (1, -1) for s in [s for s in ranked if s.candidate.sign == sign][:size]]
