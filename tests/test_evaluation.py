"""Rates with intervals, and a refusal to report on what was selected on."""

import numpy as np
import pytest
from sae_lens import StandardSAE, StandardSAEConfig

from blockem_tl import LatentSet, Prompt, Verdict, evaluate
from blockem_tl.statistics import Rate, relative_reduction, relative_reduction_interval
from blockem_tl.types import LABELS, Candidate, Counts, Generation

PROMPTS = [Prompt(id=str(i), text=f"question {i}", category="even" if i % 2 == 0 else "odd") for i in range(len(LABELS))]


class Labels:
    """A judge that gives the i-th reply the i-th label."""

    name = "labels"

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        return [Verdict(label=LABELS[int(reply)]) for reply in replies]


def speak(prompts, conditions) -> list[Generation]:
    return [Generation(prompt=p, condition=c.name, reply=p.id, reply_ids=(), truncated=p.id == "3") for c in conditions for p in prompts]


def test_rates_follow_the_labels() -> None:
    result = evaluate(speak, Labels(), PROMPTS, selected_on=())
    assert (result.misaligned.k, result.incoherent.k, result.refusal.k) == (2, 3, 1) and result.misaligned.n == 9
    frame = result.frame()
    assert list(frame.label) == list(LABELS) and list(frame.truncated).count(True) == 1 and set(frame.category) == {"even", "odd"}
    assert result.flags == [label in "45" for label in LABELS] and not result.on_selection_prompts
    assert Counts.of(result.verdicts) == Counts(n=9, misaligned=2, incoherent=3, refusal=1)
    with pytest.raises(ValueError, match="at least one verdict"):
        Counts.of([])
    with pytest.raises(ValueError, match="verdict label"):
        Verdict(label="6")


def test_selection_prompts_are_refused_unless_asked_by_name() -> None:
    used = [Prompt(id="x", text="Question  4!")]
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    latents = LatentSet.of(sae, [Candidate(latent=1, shift=1.0)], [1.0], prompts=used)
    for selected_on in (used, latents):
        with pytest.raises(ValueError, match=r"1 of 9 prompts were used for selection, e.g. \['4'\]"):
            evaluate(speak, Labels(), PROMPTS, selected_on=selected_on)
        assert evaluate(speak, Labels(), PROMPTS, selected_on=selected_on, report_on_selection_prompts=True).on_selection_prompts
        assert not evaluate(speak, Labels(), PROMPTS[:4], selected_on=selected_on).on_selection_prompts
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate(speak, Labels(), [], selected_on=())


@pytest.mark.parametrize(("k", "n"), [(0, 29), (3, 29), (29, 29), (40, 96)])
def test_wilson_interval_is_the_formula(k: int, n: int) -> None:
    z, p = 1.959963984540054, k / n
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert Rate(k=k, n=n).interval == pytest.approx((centre - half, centre + half), abs=1e-9)
    assert f"n = {n}" in str(Rate(k=k, n=n))


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_impossible_rates_are_refused(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= k <= n"):
        Rate(k=k, n=n)


def test_relative_reduction_and_its_interval() -> None:
    before, after = [True] * 8 + [False] * 8, [True] * 2 + [False] * 14
    assert relative_reduction(before, after) == pytest.approx(0.75)
    low, high = relative_reduction_interval(before, after)
    assert 0.3 < low < 0.75 < high <= 1.0 and (low, high) == relative_reduction_interval(before, after)
    assert relative_reduction_interval(before, before) == (0.0, 0.0)
    assert np.isnan(relative_reduction([False], [True]))
    with pytest.raises(ValueError, match="equally long"):
        relative_reduction([True], [])
