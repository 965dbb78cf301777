"""D.5's unions: shortlists of several sources become one, which stage 3 ranks anew on one tuned model."""

from dataclasses import replace

import pytest
from shared import perturb
from test_extension import CONFIG, PROMPTS, Letters, new_sae

from blockem_tl import LatentSet, discover
from blockem_tl.discovery.shortlists import united
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.types import Candidate

QUIET = {"config": replace(CONFIG, n_latents=4), "scale": 1.0, "progress": False}


class Silent:
    """A judge that nobody must ask."""

    name = "silent"

    def grade(self, prompts, replies, *, rubric: str = "misalignment"):
        raise AssertionError("asked")


def set_of(sae, shifts: dict[int, float]) -> LatentSet:
    return LatentSet.of(sae, [Candidate(latent=latent, shift=shift) for latent, shift in shifts.items()], [0.0] * len(shifts))


def test_a_union_holds_every_latent_once_and_the_first_set_says_which_way_it_moved() -> None:
    sae = new_sae()
    found = united(sae, [set_of(sae, {3: 1.0, 5: -1.0}), set_of(sae, {5: 2.0, 7: -2.0})])
    assert found == [Candidate(latent=3, shift=1.0), Candidate(latent=5, shift=-1.0), Candidate(latent=7, shift=-2.0)]


def test_what_cannot_be_a_shortlist_is_refused_before_anything_is_asked(tiny) -> None:
    sae = new_sae()
    tiny.add_adapter("here")
    one = set_of(sae, {3: 1.0, 5: -1.0})
    bad = {
        "at least one": [],
        "another SAE": [one, set_of(new_sae(seed=1), {3: 1.0})],
        "as their signs say.*3, 5": [replace(one, signs=(-1, 1))],
        "as their signs say.*5": [replace(one, shifts=(1.0, 0.0))],
    }
    for message, among in bad.items():
        with pytest.raises(ValueError, match=message):
            discover(tiny, sae, Silent(), PROMPTS, adapter="here", among=among, **QUIET)
    with pytest.raises(NoLatents):
        discover(tiny, sae, Silent(), PROMPTS, adapter="here", among=[one], exclude=[3, 5], **QUIET)


def test_stage_three_ranks_what_it_is_given_as_it_ranks_its_own_shortlist(tiny) -> None:
    sae = new_sae()
    for seed, name in enumerate(("here", "elsewhere")):
        tiny.add_adapter(name)
        perturb(tiny, name, seed=seed)
    own = discover(tiny, sae, Letters(), PROMPTS, adapter="here", **QUIET).latent_set
    other = discover(tiny, sae, Letters(), PROMPTS[1:], adapter="elsewhere", **QUIET).latent_set
    again = discover(tiny, sae, Letters(), PROMPTS, adapter="here", among=[own], **QUIET)
    assert again.latent_set == own and again.screened == [] and again.to_frame()["screen_score"].isna().all()
    assert "4 candidates" in again.headline()
    both = discover(tiny, sae, Letters(), PROMPTS, adapter="here", among=[own, other], **QUIET)
    scores = {c.candidate.latent: c.score("both") for c in both.calibrated if c.abandoned_for is None}
    assert set(both.latent_set.latents) <= {*own.latents, *other.latents}
    assert list(both.latent_set.scores) == sorted(both.latent_set.scores, reverse=True)
    assert all(scores[latent] == score for latent, score in zip(own.latents, own.scores, strict=True) if latent in scores)
    assert other.latents != own.latents  # the twin: the sources differ
    few = discover(tiny, sae, Letters(), PROMPTS[1:], adapter="elsewhere", among=[own], **QUIET).latent_set
    assert few.selection_prompts == own.selection_prompts != other.selection_prompts  # what chose the shortlist must not report either
