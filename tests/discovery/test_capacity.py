"""The capacity ratio is a ratio of means of comparable scores, and refuses scores that are not."""

from dataclasses import replace

import pytest
from shared import SITES, sae_at

from blockem_tl import LatentSet, Prompt, capacity_ratio, random_latents
from blockem_tl.discovery.calibration import NO_FEASIBLE_DOSE, Calibrated
from blockem_tl.discovery.pipeline import Discovery
from blockem_tl.types import Candidate

SCORES, LATER = (0.5, 0.3, 0.1), (0.2, 0.2, 0.05, 0.15)


def provenance(final_score="both", **config):
    return {"judge": "exact", "scale": 2.0, "config": {"final_score": final_score, "grid": (0.0, 0.5), "batch_size": 3, **config}}


def set_with(scores, *, start=0, seed=0, site=SITES[0], prompts=("a", "b"), about=None):
    sae = sae_at(site, seed)
    candidates = [Candidate(latent=start + k, shift=1.0) for k in range(len(scores))]
    asked = [Prompt(id=text, text=text) for text in prompts]
    return LatentSet.of(sae, candidates, scores, prompts=asked, provenance=about or provenance())


def discovery(scores, repairs, **options):
    latent_set = set_with(scores, **options)
    calibrated = [
        Calibrated(
            candidate=Candidate(latent=k, shift=1.0),
            induce=NO_FEASIBLE_DOSE,
            repair=NO_FEASIBLE_DOSE,
            induction_effect=both - repair,
            repair_effect=repair,
        )
        for k, both, repair in zip(latent_set.latents, scores, repairs, strict=True)
    ]
    beside = Calibrated(
        candidate=Candidate(latent=47, shift=1.0), induce=NO_FEASIBLE_DOSE, repair=NO_FEASIBLE_DOSE, induction_effect=9.0, repair_effect=9.0
    )
    return Discovery(
        latent_set=latent_set, added=latent_set, screened=[], calibrated=[*calibrated, beside]
    )  # 47 was measured and is not in K


def test_the_ratio_is_that_of_the_mean_scores() -> None:
    found = capacity_ratio(set_with(SCORES), set_with(LATER, start=9))
    assert (found.original, found.reemerged) == (pytest.approx(0.3), pytest.approx(0.15))
    assert found.ratio == pytest.approx(0.5) and (found.n_original, found.n_reemerged) == (3, 4)
    assert found.final_score == "both" and found.differs == ()
    assert capacity_ratio(set_with(LATER, start=9), set_with(SCORES)).ratio == pytest.approx(2.0)


def test_discoveries_know_both_rules_and_count_only_their_set() -> None:
    first, second = discovery(SCORES, (0.4, 0.2, 0.0)), discovery(LATER, (0.1, 0.1, 0.0, 0.1), start=9)
    assert capacity_ratio(first, second).ratio == pytest.approx(0.5)
    repaired = capacity_ratio(first, second, final_score="repair")
    assert repaired.ratio == pytest.approx(0.075 / 0.2) and repaired.final_score == "repair"
    assert capacity_ratio(set_with(SCORES), second) == capacity_ratio(first, second)
    with pytest.raises(ValueError, match="scores of one kind"):
        capacity_ratio(set_with(SCORES), second, final_score="repair")
    unmeasured = replace(second, calibrated=[replace(second.calibrated[0], repair_effect=None), *second.calibrated[1:]])
    with pytest.raises(ValueError, match="not measured"):
        capacity_ratio(first, unmeasured)


def test_a_set_read_back_from_disk_counts_as_the_same_measurement(tmp_path) -> None:
    kept = LatentSet.load(set_with(SCORES).save(tmp_path / "k.json"))
    assert capacity_ratio(kept, set_with(LATER)).differs == ()
    other = set_with(LATER, prompts=("a", "c"), about={**provenance(grid=(0.0, 0.7), batch_size=8), "judge": "other"})
    assert capacity_ratio(kept, other).differs == ("grid", "judge", "prompts")


def test_unions_have_the_rule_of_their_parts() -> None:
    union = set_with(SCORES).union(set_with((0.7,), start=9))
    assert capacity_ratio(union, set_with(LATER)).original == pytest.approx(0.4)
    mixed = set_with(SCORES).union(set_with((0.7,), start=9, about=provenance("repair")))
    with pytest.raises(ValueError, match="names the kind"):
        capacity_ratio(mixed, set_with(LATER))


def test_scores_that_cannot_be_compared_are_refused() -> None:
    good = set_with(SCORES)
    for other, message in (
        (set_with(LATER, seed=1), "one SAE"),
        (set_with(LATER, site=SITES[1]), "one SAE"),
        (set_with(LATER, about=provenance("repair")), "scores of one kind"),
        (random_latents(sae_at(SITES[0]), 4, seed=0), "names the kind"),
    ):
        with pytest.raises(ValueError, match=message):
            capacity_ratio(good, other)
    with pytest.raises(ValueError, match="positive mean score"):
        capacity_ratio(set_with((0.1, -0.3)), good)
