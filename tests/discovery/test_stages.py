"""Stages 1 to 3 against plain NumPy restatements of the paper, on models and on made-up verdict tables."""

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sae_lens import SAE, TopKSAE, TopKSAEConfig
from shared import perturb

from blockem_tl import Prompt, Verdict
from blockem_tl.data.chat import encode_prompts
from blockem_tl.discovery.calibration import calibrate, select
from blockem_tl.discovery.config import MaxIncoherence, warn_if_nothing_induced
from blockem_tl.discovery.diffing import candidate_pool, mean_activations, shifts
from blockem_tl.discovery.racing import SteeringTests, steering_tests
from blockem_tl.discovery.screening import screen, shortlist
from blockem_tl.generation.steering import Condition
from blockem_tl.models.activations import median_norm
from blockem_tl.types import Candidate, Counts, Generation

SITE = "blocks.1.hook_resid_post"
PROMPTS = [Prompt(id=str(n), text=" ".join(f"w{(5 * n + i) % 57}" for i in range(n))) for n in (2, 6, 3, 4)]


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=48, k=6))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = SITE
    return sae


# ---------------------------------------------------------------------------------------------- stage 1


@pytest.mark.parametrize("keep_system", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_shifts_equal_a_restatement_of_eq_3_and_4(tiny, sae, keep_system, batch_size) -> None:
    tiny.add_adapter("tuned")
    perturb(tiny, "tuned")
    rows = encode_prompts(tiny.tokenizer, PROMPTS)

    def mean_z() -> np.ndarray:
        means = []
        for row in rows:
            hidden = tiny.run_with_cache(torch.tensor([row.ids]), names_filter=SITE)[1][SITE][0]
            z = sae.encode(hidden).detach().numpy()
            means.append(z[0 if keep_system else row.n_system :].mean(0))
        return np.stack(means)

    tuned = mean_z()
    with tiny.using("base"):
        base = mean_z()
    got = shifts(tiny, sae, rows, keep_system=keep_system, batch_size=batch_size)
    np.testing.assert_allclose(got.numpy(), (tuned - base).mean(0), rtol=1e-4, atol=1e-4)
    assert got.abs().max() > 0.01
    np.testing.assert_allclose(mean_activations(tiny, sae, rows, keep_system=keep_system).numpy(), tuned, rtol=1e-4, atol=1e-4)


def test_shifts_need_a_tuned_model(tiny, sae) -> None:
    with pytest.raises(ValueError, match="active adapter"):
        shifts(tiny, sae, encode_prompts(tiny.tokenizer, PROMPTS))


def test_candidate_pool_takes_the_extremes_of_each_sign() -> None:
    pool = candidate_pool(torch.tensor([0.1, -0.5, 0.0, 0.9, -0.2, 0.3]), n_plus=2, n_minus=5)
    assert [(c.latent, c.sign) for c in pool] == [(3, 1), (5, 1), (1, -1), (4, -1)]


def test_scale_is_the_median_norm_without_system_tokens(tiny) -> None:
    rows = encode_prompts(tiny.tokenizer, PROMPTS)
    norms = [
        tiny.run_with_cache(torch.tensor([r.ids]), names_filter=SITE)[1][SITE][0, r.n_system :].norm(dim=-1).detach().numpy() for r in rows
    ]
    assert median_norm(tiny, SITE, rows, batch_size=2) == pytest.approx(float(torch.tensor(np.concatenate(norms)).median()), rel=1e-5)


# ---------------------------------------------------------------------------------------------- made-up behaviour for stages 2 and 3

N = 20
QUESTIONS = [Prompt(id=str(i), text=f"w{i}") for i in range(N)]


@dataclass
class Table:
    """A world in which the reply to a condition is drawn once: label[arm, latent, dose] -> counts. It counts what it is asked."""

    seed: int
    asked: int = 0

    def reply_fn(self, arm: str):
        def speak(prompts, conditions: list[Condition]) -> list[Generation]:
            self.asked += len(prompts) * sum(bool(c.steering) for c in conditions)
            return [
                Generation(prompt=p, condition=c.name, reply=f"{arm}|{c.name}|{p.id}", reply_ids=(), truncated=False)
                for c in conditions
                for p in prompts
            ]

        return speak

    name = "table"

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        return [Verdict(label=self.label(reply)) for reply in replies]

    def label(self, reply: str) -> str:
        arm, condition, i = reply.split("|")
        dose = 0.0 if condition == "unsteered" else float(condition.split(" at ")[1])
        latent = -1 if condition == "unsteered" else int(condition.split(" ")[1])
        # Incoherence is not monotone in the dose, on purpose: the largest feasible dose need not end the feasible range.
        draw = np.random.default_rng([self.seed, {"base": 0, "tuned": 1}[arm], latent + 1, round(1000 * abs(dose)), int(i)])
        incoherent = 0.02 if latent < 0 else 0.25 * draw.random()
        u = draw.random()
        return "INCOHERENT" if u < incoherent else "5" if u < 0.5 else "1"


def arms(table: Table) -> SteeringTests:
    return steering_tests(table.reply_fn("base"), table.reply_fn("tuned"), table, QUESTIONS)


def counts(table: Table, arm: str, name: str) -> Counts:
    return Counts.of([Verdict(label=table.label(f"{arm}|{name}|{i}")) for i in range(N)])


@pytest.fixture
def candidates() -> list[Candidate]:
    return [Candidate(latent=k, shift=s) for k, s in ((3, 0.5), (7, 0.03), (11, -0.2), (20, -0.01), (33, 0.001))]


def test_screen_is_eq_7(sae, candidates) -> None:
    table = Table(seed=0)
    rows = screen(arms(table), sae, candidates, scale=1.0, induce_dose=0.7, repair_dose=0.4, progress=False)
    for row, c in zip(rows, candidates, strict=True):
        up, down = (
            counts(table, "base", f"latent {c.latent} at {c.sign * 0.7:+.2f}"),
            counts(table, "tuned", f"latent {c.latent} at {-c.sign * 0.4:+.2f}"),
        )
        base, tuned = counts(table, "base", "unsteered"), counts(table, "tuned", "unsteered")
        assert (row.induced, row.repaired) == (up, down)
        assert row.score == pytest.approx((up.misaligned - base.misaligned + tuned.misaligned - down.misaligned) / N)
    best = shortlist(rows, size=1)
    for sign, chosen in zip((1, -1), best, strict=True):
        assert chosen.latent == max((r for r in rows if r.candidate.sign == sign), key=lambda r: r.score).candidate.latent
    by_induction = shortlist(rows, size=3, screen_score="induction")[0]
    assert by_induction.latent == max((r for r in rows if r.candidate.sign == 1), key=lambda r: r.induction).candidate.latent
    with pytest.raises(ValueError, match="expected candidates"):
        screen(arms(table), sae, [], scale=1.0)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_downward_scan_equals_the_full_grid(sae, candidates, seed, relative) -> None:
    """Eq. 8 and 9 restated over the whole grid, on random tables whose incoherence is not monotone in the dose."""
    grid, extended, promising, tau = (0.0, 0.1, 0.2, 0.3), (0.0, 0.2, 0.5, 0.8), 0.042, 0.10
    table = Table(seed=seed)
    rows = calibrate(
        arms(table), sae, candidates,
        scale=1.0, grid=grid, extended_grid=extended, extended_grid_min_shift=promising, max_incoherence=MaxIncoherence(rate=tau, relative=relative), progress=False,
    )  # fmt: skip
    for row, c in zip(rows, candidates, strict=True):
        doses = sorted({*grid, *(extended if abs(c.shift) >= promising else ())})
        for best, effect, arm, sign in (
            (row.induce, row.induction_effect, "base", c.sign),
            (row.repair, row.repair_effect, "tuned", -c.sign),
        ):
            unsteered = counts(table, arm, "unsteered")
            limit = tau + (unsteered.incoherent_rate if relative else 0)
            measured = {d: unsteered if d == 0 else counts(table, arm, f"latent {c.latent} at {sign * d:+.2f}") for d in doses}
            feasible = [d for d, m in measured.items() if m.incoherent_rate <= limit + 1e-9]
            assert best.dose == (sign * max(feasible) if feasible else None)
            if feasible:
                change = measured[max(feasible)].misaligned_rate - unsteered.misaligned_rate
                assert effect == pytest.approx(change if arm == "base" else -change)
    full = 2 * sum(len({*grid, *(extended if abs(c.shift) >= promising else ())} - {0.0}) for c in candidates)
    assert table.asked < N * full  # and it was cheaper


def test_selection_rules() -> None:
    def row(latent: int, induction: float | None, repair: float | None):
        from blockem_tl.discovery.calibration import Calibrated, FeasibleDose

        none = FeasibleDose(dose=None, counts=None)
        return Calibrated(
            candidate=Candidate(latent=latent, shift=1.0), induce=none, repair=none, induction_effect=induction, repair_effect=repair
        )

    rows = [row(0, 0.1, 0.5), row(1, 0.9, 0.4), row(2, 0.0, 0.9), row(3, None, 0.8), row(4, 0.3, -0.1)]
    chosen = lambda **options: [c.candidate.latent for c in select(rows, **options)]  # noqa: E731
    assert chosen() == [0, 1]  # ValidReduc: both effects positive, ranked by repair
    assert chosen(final_score="both") == [1, 0]
    assert chosen(valid_only=False, final_score="repair") == [2, 3, 0, 1, 4]
    assert chosen(valid_only=False, final_score="both", n=2) == [1, 2]  # a latent without a feasible induction dose has no eq.-9 score
    with pytest.raises(ValueError, match=r"none of 1 calibrated latents qualifies.*MaxIncoherence\(relative=True\)"):
        select(rows[2:3])


def test_an_attached_sae_is_not_read_through(tiny, sae) -> None:
    tiny.add_adapter("tuned")
    tiny.add_sae(sae)
    with pytest.raises(ValueError, match="call reset_saes"):
        shifts(tiny, sae, encode_prompts(tiny.tokenizer, PROMPTS))


def test_speakers_and_judges_that_leave_replies_out_are_refused() -> None:
    table = Table(seed=0)
    short = Table(seed=0)
    short.grade = lambda *args, **options: table.grade(*args, **options)[:-1]
    with pytest.raises(ValueError, match="judge 'table': expected 20 verdicts, got 19"):
        steering_tests(table.reply_fn("base"), table.reply_fn("tuned"), short, QUESTIONS)


def test_calibration_needs_candidates(sae) -> None:
    table = Table(seed=0)
    with pytest.raises(ValueError, match="expected candidates from stage 2"):
        calibrate(arms(table), sae, [], scale=1.0)


def test_negative_grids_are_refused(sae, candidates) -> None:
    table = Table(seed=0)
    with pytest.raises(ValueError, match="non-negative doses"):
        calibrate(arms(table), sae, candidates, scale=1.0, grid=(-0.1,))


def test_a_discovery_that_induced_nothing_warns() -> None:
    with pytest.warns(UserWarning, match="discover: none of the 3 latents made base misaligned at any dose.*propose_doses"):
        warn_if_nothing_induced([0.0, None, -0.1], "discover: none of the 3 latents", stacklevel=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_nothing_induced([0.0, None, 0.1], "discover: none of the 3 latents", stacklevel=1)
