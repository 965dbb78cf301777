"""Stages 2 and 3 stop as soon as the answer is certain: on random verdict tables the answer is that of the full grid, and cheaper."""

import itertools
from dataclasses import dataclass, field

import jaxtyping
import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from blockem_tl import Prompt, Verdict
from blockem_tl.discovery import calibration, screening
from blockem_tl.discovery.calibration import Selection, calibrate, select
from blockem_tl.discovery.config import MaxIncoherence
from blockem_tl.discovery.racing import MINUS_INFINITY, Bounds, Tally, beaten, steering_tests
from blockem_tl.discovery.screening import Shortlisting, screen, shortlist
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.types import UNPARSED, Candidate, Counts, Generation

N = 13
QUESTIONS = [Prompt(id=str(i), text=f"w{i}") for i in range(N)]
GRID = (0.0, 0.2, 0.4, 0.5, 0.7, 1.0)


@pytest.fixture(scope="module")
def sae() -> SAE:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=40))
    sae.W_dec.data.normal_()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    return sae


@pytest.fixture(autouse=True)
def _unchecked_shapes():
    """Hundreds of tables: without the run-time shape checks, which take nine tenths of the time here (test_stages.py has them on)."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@dataclass
class Table:
    """A world of fixed verdicts: (arm, latent, dose) -> a label for every prompt. It counts the replies that it is asked for.

    Few prompts make ties common; incoherence grows with the dose, noisily; a latent may help, do nothing or do harm.
    """

    seed: int
    unparsed: float
    asked: int = 0
    labels: dict = field(default_factory=dict)
    name: str = "table"

    def row(self, arm: str, latent: int, dose: float) -> list[str]:
        key = (arm, latent, dose)
        if key not in self.labels:
            draw = np.random.default_rng([self.seed, arm == "tuned", latent + 1, round(100 * (dose + 5))])
            own = np.random.default_rng([self.seed, arm == "tuned", latent + 1])
            bias, fragile = own.normal(0, 0.3), own.random()
            misaligned = (0.05 if arm == "base" else 0.6) + (bias * abs(dose) * 2 if latent >= 0 else 0)
            incoherent = min(1.0, max(0.03, (abs(dose) * 2 * fragile) ** 2 + draw.normal(0, 0.05)))
            chances = draw.random((N, 3))
            self.labels[key] = [
                UNPARSED if u < self.unparsed else "INCOHERENT" if i < incoherent else "5" if m < misaligned else "1" for u, i, m in chances
            ]
        return self.labels[key]

    def reply_fn(self, arm: str):
        def speak(prompts, conditions: list[Condition]) -> list[Generation]:
            self.asked += len(prompts) * len(conditions)
            replies = []
            for c in conditions:
                latent, dose = (int(c.name.split()[1]), c.steering[0].dose) if c.steering else (-1, 0.0)
                row = self.row(arm, latent, round(dose, 3))
                replies += [Generation(prompt=p, condition=c.name, reply=row[int(p.id)], reply_ids=(), truncated=False) for p in prompts]
            return replies

        return speak

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        return [Verdict(label=reply) for reply in replies]


@dataclass(frozen=True)
class Setting:
    screen_score: str = "both"
    final_score: str = "both"
    valid_only: bool = False
    relative: bool = False
    unparsed: float = 0.0
    keep: int = 4
    n: int = 3


SETTINGS = [
    Setting(screen_score, final_score, valid_only, relative, unparsed)
    for screen_score, final_score, valid_only, relative, unparsed in itertools.product(
        ("both", "induction"), ("both", "repair"), (False, True), (False, True), (0.0, 0.15)
    )
]


def stages(sae: SAE, seed: int, setting: Setting, full_grid: bool, smallest_wave: int = 1):
    """Stages 2 and 3 on a made-up table; (K or the error, screened, calibrated, replies asked)."""
    table = Table(seed=seed, unparsed=setting.unparsed)
    draw = np.random.default_rng(seed)
    candidates = [
        Candidate(latent=int(k), shift=float(s)) for k, s in zip(draw.permutation(40)[:16], draw.normal(0, 0.05, 16), strict=True)
    ]
    arms = steering_tests(table.reply_fn("base"), table.reply_fn("tuned"), table, QUESTIONS, smallest_wave=smallest_wave)
    shortlisting = Shortlisting(size=setting.keep, screen_score=setting.screen_score)
    screened = screen(
        arms, sae, candidates, scale=1.0, induce_dose=0.5, repair_dose=0.4, shortlisting=shortlisting, full_grid=full_grid, progress=False
    )
    chosen = shortlist(screened, size=setting.keep, screen_score=setting.screen_score)
    selection = Selection(n=setting.n, final_score=setting.final_score, valid_only=setting.valid_only)
    calibrated = calibrate(
        arms, sae, chosen, scale=1.0, grid=GRID, extended_grid=(1.3,), max_incoherence=MaxIncoherence(rate=0.1, relative=setting.relative),
        selection=selection, full_grid=full_grid, progress=False,
    )  # fmt: skip
    try:
        best = select(calibrated, n=setting.n, final_score=setting.final_score, valid_only=setting.valid_only)
        found = [(c.candidate.latent, c.candidate.sign, c.candidate.shift, c.score(setting.final_score)) for c in best]
    except ValueError as error:
        found = str(error)
    return found, screened, calibrated, table.asked


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: f"{s.screen_score}-{s.final_score}-{s.valid_only}-{s.relative}-{s.unparsed}")
def test_the_answer_is_that_of_the_full_grid(sae, setting) -> None:
    check_tables(sae, setting, range(16, 20))  # ties for the last place decide in some of these


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_answer_is_that_of_the_full_grid_on_many_more_tables(sae, setting) -> None:
    check_tables(sae, setting, range(100))


def check_tables(sae: SAE, setting: Setting, seeds: range) -> None:
    asked, asked_full = 0, 0
    for seed in seeds:
        found, screened, calibrated, cost = stages(sae, seed, setting, full_grid=False)
        truth, screened_all, calibrated_all, cost_full = stages(sae, seed, setting, full_grid=True)
        assert found == truth  # latents, signs, shifts and scores to the last bit, in order
        asked, asked_full = asked + cost, asked_full + cost_full
        for known, true in zip(screened, screened_all, strict=True):
            if known.abandoned_for is None:
                assert (known.induction, known.repair) == (true.induction, true.repair)
            else:
                assert (true.score if setting.screen_score == "both" else true.induction) <= known.at_most
        for known, true in zip(calibrated, calibrated_all, strict=True):
            assert known.candidate == true.candidate
            if known.abandoned_for is None:
                assert (known.induce, known.repair) == (true.induce, true.repair)
            elif known.at_most != MINUS_INFINITY:
                assert true.score(setting.final_score) <= known.at_most
        assert all(seen.asked == seen.of == N for c in calibrated_all for seen in c.doses)
        doses = [len(GRID) - 1 + (abs(c.candidate.shift) >= 0.042) for c in calibrated_all]
        assert [len(c.doses) for c in calibrated_all] == [2 * n for n in doses]  # every dose but 0, on both arms
    assert asked < 0.8 * asked_full


def test_larger_waves_are_fewer_ask_more_and_find_the_same(sae, monkeypatch) -> None:
    """Which prompts a wave asks changes when something is certain, never the answer: what is told of a latent agrees too."""
    waves: list[int] = []
    grade = Table.grade
    monkeypatch.setattr(Table, "grade", lambda self, *given, **more: waves.append(1) or grade(self, *given, **more))
    for seed, setting in itertools.product(range(6), SETTINGS[::5]):
        seen = {}
        for smallest in (1, 60):
            waves.clear()
            seen[smallest] = (*stages(sae, seed, setting, full_grid=False, smallest_wave=smallest), len(waves))
        (found, _, small, asked, n), (also, _, large, more, fewer) = seen[1], seen[60]
        assert found == also and more >= asked and fewer < n
        both = [(a, b) for a, b in zip(small, large, strict=True) if a.abandoned_for is b.abandoned_for is None]
        assert all((a.induce, a.repair) == (b.induce, b.repair) for a, b in both)


def test_most_settings_abandon_latents(sae) -> None:
    """Otherwise the tables would test little."""
    runs = [stages(sae, 0, setting, full_grid=False) for setting in SETTINGS[::3]]
    assert sum(any(s.abandoned_for for s in screened) for _, screened, _, _ in runs) == len(runs)
    assert sum(any(c.abandoned_for for c in calibrated) for _, _, calibrated, _ in runs) > len(runs) / 4


def eager_bounds(spans: list[Bounds], keep: int) -> list[bool]:
    """Compares the middles of the spans, as if what is likely were certain."""
    middle = [(span.low + span.high) / 2 for span in spans]
    last = sorted(middle, reverse=True)[keep - 1 : keep]
    return [bool(last) and value < last[0] for value in middle]


def careless_ties(spans: list[Bounds], keep: int) -> list[bool]:
    """Drops everything that can at best tie with the last place, earlier in the list or not."""
    floor = sorted((span.low for span in spans), reverse=True)[keep - 1 : keep]
    return [bool(floor) and span.high <= floor[0] and span.low < span.high for span in spans]


@pytest.mark.parametrize(("module", "wrong"), [(screening, eager_bounds), (screening, careless_ties), (calibration, eager_bounds)])
def test_an_overeager_shortcut_would_be_caught(sae, monkeypatch, module, wrong) -> None:
    def differs(setting: Setting, seed: int) -> bool:
        truth = stages(sae, seed, setting, full_grid=True)[0]
        with monkeypatch.context() as patch:
            patch.setattr(module, "beaten", wrong)
            try:
                return stages(sae, seed, setting, full_grid=False)[0] != truth
            except (TypeError, ValueError):
                return True

    assert any(differs(setting, seed) for seed in range(16, 30) for setting in SETTINGS[::8])


def test_a_dose_dropped_too_early_would_be_caught(sae, monkeypatch) -> None:
    """Leaving a dose when it is *likely* over the budget (missing replies as incoherent as those so far) changes the answer."""
    honest = Tally.if_rest

    def likely(self: Tally, label: str) -> Counts:
        counts = honest(self, label)
        known = len(self.verdicts)
        extra = self.left * counts.incoherent // known if known and label == "1" else 0
        return Counts(n=counts.n, misaligned=counts.misaligned, incoherent=counts.incoherent + extra, refusal=0)

    truths = {seed: stages(sae, seed, Setting(), full_grid=True)[0] for seed in range(12)}
    monkeypatch.setattr(Tally, "if_rest", likely)
    assert any(stages(sae, seed, Setting(), full_grid=False)[0] != truth for seed, truth in truths.items())


def test_bounds_hold_whatever_the_missing_verdicts_are() -> None:
    """Every completion of every short tally, unparsed verdicts among them, lies between the bounds, and both bounds are reached."""
    labels = ("1", "5", "INCOHERENT", UNPARSED)
    for known in itertools.product(labels, repeat=2):
        tally = Tally(UNSTEERED, 5)
        for i, label in enumerate(known):
            tally.add(i, Verdict(label=label))
        span = tally.bounds(lambda counts: counts.misaligned_rate)
        ends = [
            Counts.of([Verdict(label=label) for label in (*known, *rest)])
            for rest in itertools.product(labels, repeat=3)
            if {*known, *rest} != {UNPARSED}
        ]
        rates = [counts.misaligned_rate for counts in ends]
        assert (span.low, span.high) == (min(rates), max(rates))
        assert tally.if_rest("1").incoherent_rate == min(counts.incoherent_rate for counts in ends)
        assert tally.if_rest("INCOHERENT").incoherent_rate == max(counts.incoherent_rate for counts in ends)


def test_beaten_is_the_tail_of_a_stable_sort() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        values, keep = draw.integers(0, 4, 9).tolist(), int(draw.integers(1, 10))
        ranked = sorted(range(9), key=lambda i: values[i], reverse=True)
        out = beaten([Bounds.at(value) for value in values], keep)
        assert [i for i in range(9) if out[i]] == sorted(ranked[keep:])
    wide = [Bounds(low=0.0, high=1.0), Bounds.at(0.5), Bounds.at(0.5)]
    assert beaten(wide, 1) == [False, False, True]  # a tie goes to the earlier one
    assert beaten(wide, 3) == beaten([], 3) + [False] * 3 == [False] * 3


def test_what_was_abandoned_is_never_scored_and_serves_no_other_selection(sae) -> None:
    setting = Setting(final_score="repair", valid_only=True)
    runs = (stages(sae, seed, setting, full_grid=False) for seed in range(20))
    _, screened, calibrated, _ = next(run for run in runs if any(c.abandoned_for for c in run[2]))
    lost = next(s for s in screened if s.abandoned_for)
    with pytest.raises(ValueError, match=f"latent {lost.candidate.latent} was abandoned, its score is not known"):
        _ = lost.score
    with pytest.raises(ValueError, match="abandoned while screening for .*size=5.*cannot be told"):
        shortlist(screened, size=5)
    with pytest.raises(ValueError, match="abandoned while screening"):
        shortlist(screened, size=4, screen_score="induction")
    assert shortlist(screened, size=2) == [c for sign in (1, -1) for c in [c for c in shortlist(screened, size=4) if c.sign == sign][:2]]
    gone = next(c for c in calibrated if c.abandoned_for)
    with pytest.raises(ValueError, match="was abandoned, its score is not known"):
        gone.score("repair")
    with pytest.raises(ValueError, match="abandoned while calibrating for .*n=4.*cannot be told"):
        select(calibrated, n=4, final_score="repair", valid_only=True)
    with pytest.raises(ValueError, match="abandoned while calibrating"):
        select(calibrated, n=3, final_score="repair", valid_only=False)
