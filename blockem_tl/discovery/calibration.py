"""Stage 3, calibration: how much can each latent do within the quality budget? (paper A.4, B.2)"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from sae_lens import SAE

from blockem_tl.discovery.config import EXTENDED_GRID, FLAT, GRID, Budget
from blockem_tl.discovery.racing import NEVER, NOTHING, Arm, Arms, Bar, Seen, Span, Tally, beaten
from blockem_tl.generation.steering import Condition, Steering
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.saes.latents import decoder_directions
from blockem_tl.saes.load import site_of
from blockem_tl.types import Candidate, Counts


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which calibrated latents become K: the top ``n`` by eq. 10 ("repair") or eq. 9 ("both"), of the valid ones alone or of all."""

    n: int = 20
    rule: Literal["both", "repair"] = "repair"
    valid_only: bool = True

    def span(self, induction: Span, repair: Span) -> Span:
        """Between what the score lies that a latent competes with, given its effects; minus infinity where it does not compete."""
        if self.valid_only and (induction.high <= 0 or repair.high <= 0):
            return NOTHING
        score = repair if self.rule == "repair" else induction + repair
        sure = not self.valid_only or (induction.low > 0 and repair.low > 0)
        return score if sure else Span(low=NEVER, high=score.high)


@dataclass(frozen=True, kw_only=True)
class Best:
    """The largest feasible dose of one latent in one direction, and the replies there. ``dose`` is None where none is feasible or known."""

    dose: float | None
    counts: Counts | None


NONE = Best(dose=None, counts=None)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A candidate at its largest feasible doses. An effect is None where no dose, not even 0, is within the budget.

    abandoned_for: the selection that this latent could no longer be in, where measuring stopped because of that. What was not certain
        by then is None.
    at_most: the most that its score could still have been.
    seen: every condition that was asked, in part or whole.
    """

    candidate: Candidate
    induce: Best
    repair: Best
    induction_effect: float | None
    repair_effect: float | None
    abandoned_for: Selection | None = None
    at_most: float | None = None
    seen: tuple[Seen, ...] = ()

    @property
    def valid(self) -> bool:
        """Both effects strictly positive (footnote 11)."""
        return (self.induction_effect or 0) > 0 and (self.repair_effect or 0) > 0

    def score(self, rule: Literal["both", "repair"] = "both") -> float:
        """Eq. 9 ("both") or eq. 10 / 13 ("repair"); minus infinity where a needed effect could not be measured.

        Raises ValueError for an abandoned latent: its score was never measured.
        """
        if self.abandoned_for is not None:
            raise ValueError(
                f"latent {self.candidate.latent} was abandoned, its score is not known: see at_most, or calibrate with full_grid=True"
            )
        effects = [self.repair_effect] if rule == "repair" else [self.induction_effect, self.repair_effect]
        return float("-inf") if None in effects else float(sum(e for e in effects if e is not None))


def calibrate(
    asking: Arms,
    sae: SAE[Any],
    candidates: Sequence[Candidate],
    *,
    scale: float,
    grid: Sequence[float] = GRID,
    extended_grid: Sequence[float] = EXTENDED_GRID,
    promising: float = 0.042,
    budget: Budget = FLAT,
    selection: Selection | None = None,
    full_grid: bool = False,
    progress: bool = True,
) -> list[Calibrated]:
    """For every latent and both directions the largest |dose| in its grid whose incoherence is within the budget (eq. 8).

    Latents with |shift| >= ``promising`` also get ``extended_grid``. Each grid is scanned downwards and left at the first feasible dose,
    which is the largest one, and a dose is left as soon as its incoherent replies exceed the budget: the same result as the whole grid
    at part of its cost.

    Args:
        asking: who replies, who judges, and the prompts: `both_arms`.
        scale: the site's median norm s.
        selection: stop also with latents that can no longer be in it; `select` then takes this selection (or a smaller n) only.
        full_grid: ask every dose on every prompt instead; ``seen`` then holds complete counts for all of them.
    """
    if not candidates:
        raise NoLatents("calibrate: expected candidates from stage 2, got none")
    if any(dose < 0 for dose in (*grid, *extended_grid)):
        raise ValueError("calibrate: expected non-negative doses in the grid; the sign comes from the latent's shift")
    if full_grid:
        selection = None
    latents = []
    for c, direction in zip(candidates, decoder_directions(sae, [c.latent for c in candidates]), strict=True):
        doses = sorted({*grid, *(extended_grid if abs(c.shift) >= promising else ())}, reverse=True)
        steer = partial(Steering, site=site_of(sae), direction=direction, scale=scale)
        scans = [Scan(arm, budget, c.latent, sign, doses, steer) for arm, sign in ((asking.induce, c.sign), (asking.repair, -c.sign))]
        latents.append(Latent(candidate=c, induce=scans[0], repair=scans[1]))
    # A ranking by repair alone needs induction for those in the end only; a filter by both drops most where induction comes first.
    by_repair = selection is not None and selection.rule == "repair" and not selection.valid_only
    for arm in (asking.repair, asking.induce) if by_repair else (asking.induce, asking.repair):
        _run(arm, latents, selection, full_grid, progress)
    return [latent.result(selection) for latent in latents]


class Scan:
    """One latent walking down its grid on one arm. ``best`` is None until it is certain."""

    def __init__(self, arm: Arm, budget: Budget, latent: int, sign: int, doses: Sequence[float], steer: Callable[..., Steering]) -> None:
        self.arm, self.budget, self.sign, self.doses = arm, budget, sign, doses
        named = {dose: f"latent {latent} at {sign * dose:+g}" for dose in doses if dose > 0}  # 0 is the unsteered run, already measured
        self.tallies = {d: arm.tally(Condition(name=name, steering=(steer(dose=sign * d),))) for d, name in named.items()}
        self.level = 0
        self.best: Best | None = None
        self.settle()

    @property
    def tally(self) -> Tally:
        """Of the dose that the scan stands at."""
        return self.tallies[self.doses[self.level]]

    @property
    def open(self) -> int:
        """How many replies may still have to be asked."""
        return 0 if self.best else sum(self.tallies[dose].left for dose in self.doses[self.level :] if dose > 0)

    def allows(self, counts: Counts) -> bool:
        """Whether the counts are within the budget."""
        return self.budget.allows(counts, self.arm.unsteered)

    def settle(self) -> None:
        """Leave every dose that is certainly not feasible; the first that is feasible, with all its replies there, is the best."""
        while self.best is None:
            if self.level == len(self.doses):
                self.best = NONE
                return
            dose = self.doses[self.level]
            counts = self.tally.rest("1") if dose > 0 else self.arm.unsteered
            if not self.allows(counts):
                self.level += 1
            elif dose == 0 or self.tally.left == 0:
                self.best = Best(dose=self.sign * dose, counts=counts)
            else:
                return

    def span(self) -> Span:
        """Between what the effect at the largest feasible dose lies."""
        if self.best is not None:
            return NOTHING if self.best.counts is None else Span.at(self.arm.effect(self.best.counts))
        if self.allows(self.tally.rest("INCOHERENT")):  # feasible, whatever the missing replies are like
            return self.tally.span(self.arm.effect)
        return Span(low=NEVER, high=self.arm.anything.high)

    def wave(self) -> list[int]:
        """The prompts to ask next, those first whose replies were incoherent at other doses: as few as could rule this dose out."""
        tally, counts = self.tally, self.tally.rest("1")
        fewest = next((k for k in range(1, tally.left) if not self.allows(replace(counts, incoherent=counts.incoherent + k))), tally.left)
        likely = (self.arm.incoherent + 0.5) / (self.arm.judged + 1)  # over all latents, to break ties
        for other in self.tallies.values():
            for i, verdict in other.verdicts.items():
                likely[i] += 1 if verdict.incoherent else -1
        return tally.missing(np.argsort(-likely, kind="stable").tolist())[:fewest]

    def seen(self) -> list[Seen]:
        """The doses that were asked."""
        return [
            Seen(arm=self.arm.name, dose=self.sign * dose, counts=tally.counts, asked=len(tally.verdicts), of=tally.n_prompts)
            for dose, tally in self.tallies.items()
            if tally.verdicts
        ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Latent:
    """A candidate on its way through both scans."""

    candidate: Candidate
    induce: Scan
    repair: Scan

    def span(self, selection: Selection) -> Span:
        """Between what the score lies that it competes with."""
        return selection.span(self.induce.span(), self.repair.span())

    def result(self, selection: Selection | None) -> Calibrated:
        """What is known in the end."""
        certain = self.induce.best is not None and self.repair.best is not None
        induce, repair = self.induce.best or NONE, self.repair.best or NONE
        return Calibrated(
            candidate=self.candidate,
            induce=induce,
            repair=repair,
            induction_effect=None if induce.counts is None else self.induce.arm.effect(induce.counts),
            repair_effect=None if repair.counts is None else self.repair.arm.effect(repair.counts),
            abandoned_for=None if certain else selection,
            at_most=None if certain or selection is None else self.span(selection).high,
            seen=(*self.induce.seen(), *self.repair.seen()),
        )


def _run(arm: Arm, latents: Sequence[Latent], selection: Selection | None, full_grid: bool, progress: bool) -> None:
    """Scan one arm in waves: all latents together, each at its own dose, until every one is certain or out of the selection."""
    scans = [latent.induce if latent.induce.arm is arm else latent.repair for latent in latents]
    bar = Bar(f"calibrate: {arm.name}", sum(tally.n_prompts for scan in scans for tally in scan.tallies.values()), progress)
    if full_grid:
        everything = [tally for scan in scans for tally in scan.tallies.values()]
        bar.update(asked=arm.ask((tally, tally.missing(range(tally.n_prompts))) for tally in everything), open=0)
        for scan in scans:
            scan.settle()
    while True:
        lost = _lost(latents, selection)
        pending = [scan for scan, out in zip(scans, lost, strict=True) if scan.best is None and not out]
        bar.update(asked=0, open=sum(scan.open for scan in pending), abandoned=sum(lost))
        if not pending:
            break
        bar.update(asked=arm.ask([(scan.tally, scan.wave()) for scan in pending]), open=sum(scan.open for scan in pending))
        for scan in pending:
            scan.settle()
    bar.close()


def _lost(latents: Sequence[Latent], selection: Selection | None) -> list[bool]:
    """Which latents can no longer be selected."""
    if selection is None:
        return [False] * len(latents)
    spans = [latent.span(selection) for latent in latents]
    return [span.high == NEVER or out for span, out in zip(spans, beaten(spans, selection.n), strict=True)]


def select(
    calibrated: Sequence[Calibrated], *, n: int = 20, rule: Literal["both", "repair"] = "repair", valid_only: bool = True
) -> list[Calibrated]:
    """The top ``n`` by score. The default (valid latents, repair-only ranking) is ValidReduc, the rule of the paper's main K (D.4).

    Raises:
        NoLatents: no latent qualifies.
        ValueError: latents were abandoned for another selection than this one.
    """
    for c in calibrated:
        known = c.abandoned_for
        if known is not None and (known.rule != rule or known.valid_only != valid_only or known.n < n):
            raise ValueError(
                f"select: latent {c.candidate.latent} was abandoned while calibrating for {known}, so n={n}, rule={rule!r}, "
                f"valid_only={valid_only} cannot be told: calibrate with that selection, or with full_grid=True"
            )
    eligible = [c for c in calibrated if c.abandoned_for is None and (c.valid or not valid_only) and c.score(rule) > float("-inf")]
    if not eligible:
        raise NoLatents(
            f"select: none of {len(calibrated)} calibrated latents qualifies (valid_only={valid_only}): their doses are too weak or "
            "break the incoherence budget; try Budget(relative=True), a larger tau or grid, or valid_only=False"
        )
    return sorted(eligible, key=lambda c: c.score(rule), reverse=True)[:n]
