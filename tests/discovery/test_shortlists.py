"""D.5's unions: shortlists of several sources become one, which stage 3 ranks anew on one tuned model."""

from dataclasses import replace

import pytest
from conftest import perturb
from test_extension import CONFIG, PROMPTS, Letters, new_sae

from blockem_tl import LatentSet, discover
from blockem_tl.discovery.shortlists import united
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.types import Candidate

WHOLE = replace(CONFIG, n_latents=4)


def set_of(sae, shifts: dict[int, float]) -> LatentSet:
    return LatentSet.of(sae, [Candidate(latent=latent, shift=shift) for latent, shift in shifts.items()], [0.0] * len(shifts))


def test_a_union_holds_every_latent_once_and_the_first_set_says_which_way_it_moved() -> None:
    sae = new_sae()
    found = united([set_of(sae, {3: 1.0, 5: -1.0}), set_of(sae, {5: 2.0, 7: -2.0})])
    assert found == [Candidate(latent=3, shift=1.0), Candidate(latent=5, shift=-1.0), Candidate(latent=7, shift=-2.0)]
    with pytest.raises(ValueError, match="one SAE"):
        united([set_of(sae, {3: 1.0}), set_of(new_sae(seed=1), {3: 1.0})])
    with pytest.raises(ValueError, match="one SAE"):
        united([])


def test_stage_three_ranks_what_it_is_given_as_it_ranks_its_own_shortlist(tiny) -> None:
    sae = new_sae()
    for seed, name in enumerate(("here", "elsewhere")):
        tiny.add_adapter(name)
        perturb(tiny, name, seed=seed)
    options = {"config": WHOLE, "scale": 1.0, "progress": False}
    own, other = (discover(tiny, sae, Letters(), PROMPTS, adapter=name, **options).latent_set for name in ("here", "elsewhere"))
    again = discover(tiny, sae, Letters(), PROMPTS, adapter="here", candidates=united([own]), **options)
    assert again.latent_set == own and again.screened == [] and again.to_frame()["screen_score"].isna().all()
    assert "4 candidates" in again.headline()
    both = discover(tiny, sae, Letters(), PROMPTS, adapter="here", candidates=united([own, other]), **options)
    scores = {c.candidate.latent: c.score("both") for c in both.calibrated if c.abandoned_for is None}
    assert (
        set(both.latent_set.latents) <= {*own.latents, *other.latents}
        and list(both.latent_set.scores) == sorted(both.latent_set.scores)[::-1]
    )
    assert all(scores[latent] == score for latent, score in zip(own.latents, own.scores, strict=True) if latent in scores)
    assert other.latents != own.latents  # the twin: the sources differ


def test_what_cannot_be_a_candidate_is_refused(tiny) -> None:
    sae = new_sae()
    tiny.add_adapter("here")
    perturb(tiny, "here")
    options = {"config": WHOLE, "scale": 1.0, "progress": False, "adapter": "here"}
    one = Candidate(latent=3, shift=1.0)
    for bad in ([one, one], [Candidate(latent=3, shift=0.0)], [Candidate(latent=3, shift=float("nan"))], [Candidate(latent=40, shift=1.0)]):
        with pytest.raises(ValueError, match="expected"):
            discover(tiny, sae, Letters(), PROMPTS, candidates=bad, **options)
    with pytest.raises(NoLatents):
        discover(tiny, sae, Letters(), PROMPTS, candidates=[one], exclude=[3], **options)
