"""Blocking at several sites costs what it should altogether, and SAEs that cannot be used are named before anything runs."""

from dataclasses import replace
from functools import partial

import pytest
from shared import sae_at

from blockem_tl import Run, Study
from blockem_tl.study import preferences, sites
from blockem_tl.study.defences import made
from blockem_tl.training.loss import mean_penalty

SITES = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
UNITS = ("nats", "weight")


@pytest.fixture
def saes(tmp_path) -> list[sites.Sae]:
    for site in SITES:
        sae_at(site).save_model(tmp_path / site)
    return sites.named([str(tmp_path / site) for site in reversed(SITES)])


@pytest.fixture
def study(saes, setting, tmp_path):
    """With a plain run, and a set at each site."""
    with Study(tmp_path / "study", setting, seeds=(0,), progress=False) as study:
        study.train([Run()])
        for place in sites.places(saes):
            study.latents(place.label, sites.attributed, sae=place.sae, n=3)
        study.defences["sites"] = partial(sites.blocked, out=study.out)
        yield study


def test_a_strength_in_nats_is_shared_by_all_sites(saes, setting, study) -> None:
    placed = sites.places(saes)
    assert [place.block for place in placed] == [1, 3]
    over = {"sets": tuple((place.sae, place.label) for place in placed), "positions": "all"}
    adapter, runs = study.points([Run()])[0].adapter, [Run(defence="sites", strength=2, unit=one, overrides=over) for one in UNITS]
    (priced,), (plain,) = (made(study.defences, setting, run, None, adapter) for run in runs)
    costs = [mean_penalty(setting.model, one, setting.rows(), adapter=adapter) for one in (priced, plain)]
    assert costs[0] == pytest.approx(2, rel=1e-3) != costs[1]
    ratio = (setting.elsewhere(*saes[0]).scale() / setting.scale()) ** 2
    for one in (priced, plain):
        assert one.weight[0] / one.weight[1] == pytest.approx(ratio) and one.positions == "all"


def test_what_sites_carry_together(saes, setting, study) -> None:
    placed = sites.places(saes)
    assert [sites.joined(many) for many in sites.several([*placed, placed[0]])] == [f"{placed[0].label} + {placed[1].label}"]
    targets = {"one": [(placed[1].sae, placed[1].label)], "both": [(place.sae, place.label) for place in placed]}
    (point,) = study.points([Run()])
    found = study.step("together", sites.carried_together, [point], targets=targets, split="core").set_index(["sae", "taken_out", "roles"])
    assert len(found) == 8 and found.loc["both", "latents", "reply"]["n_latents"] == 6
    read = setting.elsewhere(*placed[1].sae)
    alone = preferences.ceiling(read, point, sets=[placed[1].label]).set_index(["taken_out", "roles"])
    for roles in ("reply", "prompt+reply"):
        assert found.loc["one", "latents", roles]["margin"] == pytest.approx(alone.loc[placed[1].label, roles]["margin"], abs=1e-5)
    assert preferences.harmed(setting, point, "core") and not preferences.harmed(setting, replace(point, run=Run(defence="base")), "core")


def test_saes_that_cannot_be_compared_are_named(saes, tmp_path) -> None:
    assert sites.named(["release"], ["id"]) == [("release", "id")]
    with pytest.raises(ValueError, match="one for each of 2 SAEs, got 1"):
        sites.named(["a", "b"], ["id"])
    with pytest.raises(ValueError, match="different names or blocks"):
        sites.places([saes[0], saes[0]])
    sae_at("hook_embed").save_model(tmp_path / "embed")
    with pytest.raises(ValueError, match="sites at blocks, got .* at hook_embed"):
        sites.places(sites.named([str(tmp_path / "embed")]))
