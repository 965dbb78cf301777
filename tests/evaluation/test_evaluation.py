"""Rates with intervals, and a refusal to report on what was selected on."""

import numpy as np
import pytest
from sae_lens import StandardSAE, StandardSAEConfig

from blockem_tl import LatentSet, Prompt, Verdict, evaluate
from blockem_tl.evaluation.evaluate import Resample, paired_flags
from blockem_tl.evaluation.panel import Panel, compare, evaluate_with
from blockem_tl.evaluation.statistics import Rate, paired_difference, relative_reduction, relative_reduction_interval
from blockem_tl.types import LABELS, UNPARSED, Candidate, Counts, Generation

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
    frame = result.to_frame()
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
    low, high = relative_reduction_interval(before, before)
    assert low < 0 < high  # the same replies twice are no proof of no difference
    assert np.isnan(relative_reduction([False], [True]))
    with pytest.raises(ValueError, match="equally long"):
        relative_reduction([True], [])


# ------------------------------------------------------------------------------------------------ unparsed verdicts, resampling, panels


class Fixed:
    """A judge that knows each reply's label."""

    def __init__(self, name: str, **labels: str) -> None:
        self.name, self.labels = name, labels

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        return [Verdict(label=self.labels[reply]) for reply in replies]


def saying(*replies: str):
    """A speaker that says the same things in the same order, whatever it is asked."""

    def speak(prompts, conditions) -> list[Generation]:
        return [
            Generation(prompt=p, condition=c.name, reply=r, reply_ids=(), truncated=False)
            for c in conditions
            for p, r in zip(prompts, replies, strict=False)
        ]

    return speak


FOUR = PROMPTS[:4]


def test_unparsed_verdicts_count_in_no_rate_but_are_reported() -> None:
    judge = Fixed("j", a="5", b=UNPARSED, c="1", d="REFUSAL")
    result = evaluate(saying("a", "b", "c", "d"), judge, FOUR, selected_on=())
    assert result.misaligned == Rate(k=1, n=3) and result.refusal == Rate(k=1, n=3) and result.unparsed == Rate(k=1, n=4)
    with pytest.raises(ValueError, match="1 of 4 verdicts could not be parsed"):
        _ = result.flags
    other = evaluate(saying("c", "c", "c", "c"), judge, FOUR, selected_on=())
    assert paired_flags(result, other) == ([True, False, False], [False, False, False])
    with pytest.raises(ValueError, match="same prompts under one rubric"):
        paired_flags(result, evaluate(saying("c", "c", "c"), judge, FOUR[:3], selected_on=()))
    with pytest.raises(ValueError, match="no verdict that could be parsed"):
        _ = evaluate(saying("b"), judge, FOUR[:1], selected_on=()).misaligned


def test_incoherent_replies_are_counted_or_drawn_again() -> None:
    judge = Fixed("j", a="5", b="INCOHERENT", c="1", s="SATIRICAL/ABSURD", o="OFF-TOPIC")
    speak = saying("a", "b", "s", "o")
    counted = evaluate(speak, judge, FOUR, selected_on=())
    assert counted.incoherent.k == 3 and counted.resampled == 0
    attempts = []

    def again(attempt: int):
        attempts.append(attempt)
        return saying("b", "c") if attempt == 0 else saying("a")

    result = evaluate(speak, judge, FOUR, selected_on=(), resample=Resample(again=again))
    assert [g.reply for g in result.generations] == ["a", "a", "c", "o"] and attempts == [0, 1]
    assert (result.misaligned.k, result.incoherent.k, result.resampled) == (2, 1, 2) and result.misaligned.n == 4
    stubborn = evaluate(speak, judge, FOUR, selected_on=(), resample=Resample(again=lambda n: saying("b", "b"), attempts=2))
    assert stubborn.incoherent.k == 3 and stubborn.resampled == 2


def test_a_panel_gives_rates_per_judge_their_average_and_where_they_differ() -> None:
    judges = [Fixed("qwen", a="5", b="4", c="1", d="REFUSAL"), Fixed("llama", a="4", b="2", c="1", d=UNPARSED)]
    panel = evaluate_with(saying("a", "b", "c", "d"), judges, FOUR, selected_on=())
    assert [e.misaligned for e in panel.evaluations] == [Rate(k=2, n=4), Rate(k=1, n=3)]
    assert panel.average().value == pytest.approx((2 / 4 + 1 / 3) / 2) and panel.average().n == 3
    assert list(panel.disagreements().prompt_id) == ["1", "3"] and list(panel.disagreements().llama) == ["2", UNPARSED]
    agreed = panel.agreements()["qwen", "llama"]
    assert agreed["positive"].n == 3 and agreed["positive"].value == pytest.approx(0.4)
    assert [row["judge"] for row in panel.rows()] == ["qwen", "llama", "average"] and all(
        "n = " in row["misaligned"] for row in panel.rows()
    )
    assert {row["prompts"] for row in panel.rows()} == {"reporting"}
    marked = evaluate_with(saying("a", "b", "c", "d"), judges, FOUR, selected_on=FOUR, report_on_selection_prompts=True)
    assert {row["prompts"] for row in marked.rows()} == {"SELECTION (optimistic)"} and marked.disagreements().on_selection_prompts.all()
    with pytest.raises(ValueError, match="different names"):
        evaluate_with(saying("a", "b", "c", "d"), judges[:1] * 2, FOUR, selected_on=())
    with pytest.raises(ValueError, match="at least one judge"):
        evaluate_with(saying("a"), [], FOUR, selected_on=())
    with pytest.raises(ValueError, match="same replies under the same rubric"):
        Panel(evaluations=(panel.evaluations[0], evaluate(saying("a", "a", "a", "a"), judges[1], FOUR, selected_on=())))


def test_a_comparison_has_every_rate_and_the_paired_difference_from_one() -> None:
    replies = {"plain": "44444440", "blocked": "44000000", "alike": "44444440"}  # labels "5" and "1"
    found = {
        name: evaluate(lambda prompts, conditions, text=text: saying(*text)(prompts, conditions), Labels(), PROMPTS[:8])
        for name, text in replies.items()
    }
    table = compare(found, against="plain")
    frame = table.to_frame().set_index("model")
    assert list(frame.index) == list(replies) and (frame["n"] == 8).all()
    for name, one in found.items():
        assert frame.loc[name, "misaligned"] == one.misaligned.value
        assert (frame.loc[name, "misaligned_low"], frame.loc[name, "misaligned_high"]) == one.misaligned.interval
    difference = paired_difference(found["plain"].flags, found["blocked"].flags)
    assert frame.loc["blocked", ["difference", "difference_low", "difference_high"]].tolist() == [
        difference.value, difference.low, difference.high,
    ]  # fmt: skip
    assert np.isnan(frame.loc["plain", "difference"]) and frame.loc["alike", "difference"] == 0 > frame.loc["blocked", "difference"]
    assert "against plain: blocked -0.62 [" in repr(table) and f"{difference.value:.2f} [{difference.low:.2f}" in str(table)
    assert [tick.get_text() for tick in table.plot().axes[0].get_xticklabels()] == list(replies)


def test_a_comparison_of_what_cannot_be_compared_is_refused() -> None:
    one, other = evaluate(speak, Labels(), PROMPTS[:4]), evaluate(speak, Labels(), PROMPTS[4:])
    with pytest.raises(ValueError, match="the same prompts under one rubric"):
        compare({"plain": one, "blocked": other}, against="plain")
    for evaluations, against in (({"plain": one}, "plain"), ({"plain": one, "blocked": one}, "base")):
        with pytest.raises(ValueError, match="two evaluations or more, and one of their names as against"):
            compare(evaluations, against=against)
    with pytest.raises(TypeError, match=r"evaluate\(...\) returns them, got \{'blocked': 'Replies'\}"):
        compare.__wrapped__({"plain": one, "blocked": one.replies}, against="plain")
