"""Stage 3, calibration: the most that each latent can do within the limit on incoherence (paper A.4, B.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from sae_lens import SAE

from blockem_tl.discovery.config import EXTENDED_GRID, FLAT, GRID, FinalScore, MaxIncoherence
from blockem_tl.discovery.racing import (
    INELIGIBLE,
    MINUS_INFINITY,
    Bounds,
    DoseCounts,
    ReplyProgress,
    SteeringTest,
    SteeringTests,
    Tally,
    beaten,
)
from blockem_tl.generation.steering import Condition, Steering
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.saes.load import site_of
from blockem_tl.types import Candidate, Counts


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The calibrated latents that become K: the top ``n`` by eq. 10 ("repair") or eq. 9 ("both"), of the valid ones alone or of all."""

    n: int = 20
    final_score: FinalScore = "repair"
    valid_only: bool = True

    def bounds(self, induction: Bounds, repair: Bounds) -> Bounds:
        """Bounds on the score by which this latent is ranked, given bounds on its effects; minus infinity if it does not compete."""
        if self.valid_only and (induction.high <= 0 or repair.high <= 0):
            return INELIGIBLE
        score = repair if self.final_score == "repair" else induction + repair
        sure = not self.valid_only or (induction.low > 0 and repair.low > 0)
        return score if sure else Bounds(low=MINUS_INFINITY, high=score.high)


@dataclass(frozen=True, kw_only=True)
class FeasibleDose:
    """The largest feasible dose of one latent in one direction, and the counts there; both None if none is feasible, or none is known."""

    dose: float | None
    counts: Counts | None


NO_FEASIBLE_DOSE = FeasibleDose(dose=None, counts=None)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A candidate at its largest feasible doses.

    induction_effect, repair_effect: None if no dose, not even 0, is within the limit on incoherence.
    abandoned_for: the selection that this latent could no longer be in, so that measuring stopped; what was not certain by then is None.
    at_most: the most that an abandoned latent's score could have been.
    doses: every dose that was asked, in part or whole.
    """

    candidate: Candidate
    induce: FeasibleDose
    repair: FeasibleDose
    induction_effect: float | None
    repair_effect: float | None
    abandoned_for: Selection | None = None
    at_most: float | None = None
    doses: tuple[DoseCounts, ...] = ()

    @property
    def valid(self) -> bool:
        """Both effects strictly positive (footnote 11)."""
        return (self.induction_effect or 0) > 0 and (self.repair_effect or 0) > 0

    def score(self, final_score: FinalScore = "both") -> float:
        """Eq. 9 ("both") or eq. 10 / 13 ("repair"); minus infinity if a needed effect could not be measured.

        Raises:
            ValueError: an abandoned latent, whose score was never measured.
        """
        if self.abandoned_for is not None:
            raise ValueError(
                f"latent {self.candidate.latent} was abandoned, its score is not known: see at_most, or calibrate with full_grid=True"
            )
        effects = [self.repair_effect] if final_score == "repair" else [self.induction_effect, self.repair_effect]
        return float("-inf") if None in effects else float(sum(e for e in effects if e is not None))


def calibrate(
    tests: SteeringTests,
    sae: SAE[Any],
    candidates: Sequence[Candidate],
    *,
    scale: float,
    grid: Sequence[float] = GRID,
    extended_grid: Sequence[float] = EXTENDED_GRID,
    extended_grid_min_shift: float = 0.042,
    max_incoherence: MaxIncoherence = FLAT,
    selection: Selection | None = None,
    full_grid: bool = False,
    progress: bool = True,
) -> list[Calibrated]:
    """For every latent and both directions the largest |dose| in its grid whose incoherence is within the limit (eq. 8).

    Latents with |shift| >= ``extended_grid_min_shift`` also get ``extended_grid``. Each grid is scanned downwards and left at the first
    feasible dose, which is the largest one. A dose is left as soon as its incoherent replies exceed the limit. So the result is that of
    the whole grid, at part of its cost.

    Args:
        tests: the reply functions, the judge and the prompts: `steering_tests`.
        scale: the site's median norm s.
        selection: stop measuring latents that can no longer be in it; `select` then takes this selection (or a smaller n) only.
        full_grid: ask every dose on every prompt instead; ``doses`` then holds complete counts of all of them.
    """
    if not candidates:
        raise NoLatents("calibrate: expected candidates from stage 2, got none")
    if any(dose < 0 for dose in (*grid, *extended_grid)):
        raise ValueError("calibrate: expected non-negative doses in the grid; the sign comes from the latent's shift")
    if full_grid:
        selection = None
    latents = []
    for c, direction in zip(candidates, decoder_directions(sae, [c.latent for c in candidates]), strict=True):
        doses = sorted({*grid, *(extended_grid if abs(c.shift) >= extended_grid_min_shift else ())}, reverse=True)
        steer = partial(Steering, site=site_of(sae), direction=direction, scale=scale)
        pair = ((tests.induce, c.sign), (tests.repair, -c.sign))
        scans = [Scan(test, max_incoherence, c.latent, sign, doses, steer) for test, sign in pair]
        latents.append(Latent(candidate=c, induce=scans[0], repair=scans[1]))
    # A ranking by repair alone needs induction for those in the end only; a filter by both drops most where induction comes first.
    by_repair = selection is not None and selection.final_score == "repair" and not selection.valid_only
    for test in (tests.repair, tests.induce) if by_repair else (tests.induce, tests.repair):
        _run(test, latents, selection, full_grid, progress)
    return [latent.result(selection) for latent in latents]


class Scan:
    """One latent, scanned down its grid on one test. ``best`` is None until it is certain."""

    def __init__(
        self,
        test: SteeringTest,
        max_incoherence: MaxIncoherence,
        latent: int,
        sign: int,
        doses: Sequence[float],
        steer: Callable[..., Steering],
    ) -> None:
        self.test, self.max_incoherence, self.sign, self.doses = test, max_incoherence, sign, doses
        named = {dose: f"latent {latent} at {sign * dose:+g}" for dose in doses if dose > 0}  # 0 is the unsteered run, already measured
        self.tallies = {d: test.tally(Condition(name=name, steering=(steer(dose=sign * d),))) for d, name in named.items()}
        self.level = 0
        self.best: FeasibleDose | None = None
        self.settle()

    @property
    def tally(self) -> Tally:
        """The tally of the dose that the scan stands at."""
        return self.tallies[self.doses[self.level]]

    @property
    def open(self) -> int:
        """An upper bound on the replies still to be asked."""
        return 0 if self.best else sum(self.tallies[dose].left for dose in self.doses[self.level :] if dose > 0)

    def allows(self, counts: Counts) -> bool:
        """Whether the counts are within the limit on incoherence."""
        return self.max_incoherence.allows(counts, self.test.unsteered)

    def settle(self) -> None:
        """Leave every dose that is certainly not feasible; the first that is feasible, with all its replies there, is the best."""
        while self.best is None:
            if self.level == len(self.doses):
                self.best = NO_FEASIBLE_DOSE
                return
            dose = self.doses[self.level]
            counts = self.tally.if_rest("1") if dose > 0 else self.test.unsteered
            if not self.allows(counts):
                self.level += 1
            elif dose == 0 or self.tally.left == 0:
                self.best = FeasibleDose(dose=self.sign * dose, counts=counts)
            else:
                return

    def bounds(self) -> Bounds:
        """Bounds on the effect at the largest feasible dose."""
        if self.best is not None:
            return INELIGIBLE if self.best.counts is None else Bounds.at(self.test.effect(self.best.counts))
        if self.allows(self.tally.if_rest("INCOHERENT")):  # feasible, whatever the missing replies are like
            return self.tally.bounds(self.test.effect)
        return Bounds(low=MINUS_INFINITY, high=self.test.any_effect.high)

    def fewest(self) -> int:
        """Number of replies that could rule this dose out, or all that are left."""
        left, counts = self.tally.left, self.tally.if_rest("1")
        return next((k for k in range(1, left) if not self.allows(replace(counts, incoherent=counts.incoherent + k))), left)

    def next_prompts(self, n: int) -> list[int]:
        """The ``n`` prompts to ask next, those first whose replies were incoherent at other doses."""
        likely = (self.test.incoherent + 0.5) / (self.test.judged + 1)  # over all latents, to break ties
        for other in self.tallies.values():
            for i, verdict in other.verdicts.items():
                likely[i] += 1 if verdict.incoherent else -1
        return self.tally.missing(np.argsort(-likely, kind="stable").tolist())[:n]

    def asked(self) -> list[DoseCounts]:
        """The doses that were asked."""
        return [
            DoseCounts(test=self.test.name, dose=self.sign * dose, counts=tally.counts, asked=len(tally.verdicts), of=tally.n_prompts)
            for dose, tally in self.tallies.items()
            if tally.verdicts
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Latent:
    """A candidate with both its scans."""

    candidate: Candidate
    induce: Scan
    repair: Scan

    def bounds(self, selection: Selection) -> Bounds:
        """Bounds on the score by which it is ranked."""
        return selection.bounds(self.induce.bounds(), self.repair.bounds())

    def result(self, selection: Selection | None) -> Calibrated:
        """The calibrated candidate."""
        certain = self.induce.best is not None and self.repair.best is not None
        induce, repair = self.induce.best or NO_FEASIBLE_DOSE, self.repair.best or NO_FEASIBLE_DOSE
        return Calibrated(
            candidate=self.candidate,
            induce=induce,
            repair=repair,
            induction_effect=None if induce.counts is None else self.induce.test.effect(induce.counts),
            repair_effect=None if repair.counts is None else self.repair.test.effect(repair.counts),
            abandoned_for=None if certain else selection,
            at_most=None if certain or selection is None else self.bounds(selection).high,
            doses=(*self.induce.asked(), *self.repair.asked()),
        )


def _run(test: SteeringTest, latents: Sequence[Latent], selection: Selection | None, full_grid: bool, progress: bool) -> None:
    """Scan one test in waves: all latents together, each at its own dose, until every one is certain or out of the selection."""
    scans = [latent.induce if latent.induce.test is test else latent.repair for latent in latents]
    bar = ReplyProgress(f"calibrate: {test.name}", sum(tally.n_prompts for scan in scans for tally in scan.tallies.values()), progress)
    if full_grid:
        everything = [tally for scan in scans for tally in scan.tallies.values()]
        bar.update(asked=test.ask((tally, tally.missing(range(tally.n_prompts))) for tally in everything), open=0)
        for scan in scans:
            scan.settle()
    while True:
        lost = _lost(latents, selection)
        pending = [scan for scan, out in zip(scans, lost, strict=True) if scan.best is None and not out]
        bar.update(asked=0, open=sum(scan.open for scan in pending), abandoned=sum(lost))
        if not pending:
            break
        sizes = test.enlarged([scan.fewest() for scan in pending])
        wave = [(scan.tally, scan.next_prompts(size)) for scan, size in zip(pending, sizes, strict=True)]
        bar.update(asked=test.ask(wave), open=sum(scan.open for scan in pending))
        for scan in pending:
            scan.settle()
    bar.close()


def _lost(latents: Sequence[Latent], selection: Selection | None) -> list[bool]:
    """For each latent whether it can no longer be selected."""
    if selection is None:
        return [False] * len(latents)
    bounds = [latent.bounds(selection) for latent in latents]
    return [span.high == MINUS_INFINITY or out for span, out in zip(bounds, beaten(bounds, selection.n), strict=True)]


def select(
    calibrated: Sequence[Calibrated], *, n: int = 20, final_score: FinalScore = "repair", valid_only: bool = True
) -> list[Calibrated]:
    """The top ``n`` by score. The default (valid latents, repair-only ranking) is ValidReduc, the final_score of the paper's main K (D.4).

    Raises:
        NoLatents: no latent qualifies.
        ValueError: latents were abandoned for another selection than this one.
    """
    for c in calibrated:
        if (known := c.abandoned_for) is not None and (known.final_score != final_score or known.valid_only != valid_only or known.n < n):
            raise ValueError(
                f"select: latent {c.candidate.latent} was abandoned while calibrating for {known}, so n={n}, final_score={final_score!r}, "
                f"valid_only={valid_only} cannot be told: calibrate with that selection, or with full_grid=True"
            )
    eligible = [c for c in calibrated if c.abandoned_for is None and (c.valid or not valid_only) and c.score(final_score) > float("-inf")]
    if not eligible:
        raise NoLatents(
            f"select: none of {len(calibrated)} calibrated latents qualifies (valid_only={valid_only}): their doses are too weak or "
            "break the limit on incoherence; try MaxIncoherence(relative=True), a larger rate or grid, or valid_only=False"
        )
    return sorted(eligible, key=lambda c: c.score(final_score), reverse=True)[:n]
