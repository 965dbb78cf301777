"""A latent set survives a round trip, and refuses what it was not made for."""

import json

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig

from blockem_tl import LatentSet, Prompt, load_sae, random_latents
from blockem_tl.types import Candidate

CANDIDATES = [Candidate(latent=5, shift=0.5), Candidate(latent=2, shift=-0.25), Candidate(latent=9, shift=0.125)]


def make_sae(seed: int = 0) -> SAE:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=16))
    for parameter in sae.parameters():
        parameter.data.normal_()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.cfg.metadata.neuronpedia_id = "llama3.1-8b/19-x"
    return sae


@pytest.fixture
def sae() -> SAE:
    return make_sae()


@pytest.fixture
def latent_set(sae) -> LatentSet:
    return LatentSet.of(sae, CANDIDATES, [0.9, 0.6, 0.3], prompts=[Prompt(id="a", text="Who?")], provenance={"seed": 0})


def test_round_trip_through_readable_json(latent_set, sae, tmp_path) -> None:
    path = latent_set.save(tmp_path / "latents" / "k.json")
    assert LatentSet.load(path, sae) == latent_set
    assert json.loads(path.read_text())["latents"] == [5, 2, 9] and latent_set.signs == (1, -1, 1)
    assert list(path.parent.iterdir()) == [path]  # nothing half-written beside it


def test_a_set_for_another_sae_is_refused(latent_set, tmp_path) -> None:
    with pytest.raises(ValueError, match="made with another SAE.*run discovery with this one"):
        LatentSet.load(latent_set.save(tmp_path / "k.json"), make_sae(seed=1))
    moved = make_sae()
    moved.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    with pytest.raises(ValueError, match="got one at blocks.0.hook_resid_post"):
        latent_set.check_sae(moved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 1"),
        ({"latents": [5, 5, 9]}, "distinct"),
        ({"signs": [1, 0, 1]}, "signs"),
        ({"latents": [5, 2]}, "equal, non-zero numbers"),
        ({"latents": [5, 2, 16]}, r"0\.\.15, got \[16\]"),
        ({"surprise": 1}, "not a latent set"),
    ],
)
def test_damaged_files_are_refused(latent_set, tmp_path, change, message) -> None:
    path = latent_set.save(tmp_path / "k.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        LatentSet.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        LatentSet.load(path)


def test_variants_keep_rows_together(latent_set) -> None:
    assert latent_set.first(2).latents == (5, 2)
    chosen = latent_set.among(latent_set.latents[::-1])
    assert chosen.shifts == latent_set.shifts[::-1] and chosen.provenance["variant"] == "3 chosen"
    for wrong in ([5, 77], []):
        with pytest.raises(ValueError, match="among: expected at least one latent of this set, and no other"):
            latent_set.among(wrong)
    assert latent_set.only(1).latents == (5, 9) and latent_set.only(-1).shifts == (-0.25,)
    shuffled = {latent_set.shuffled_signs(seed).signs for seed in range(20)}
    assert len(shuffled) == 3 and all(sorted(signs) == [-1, 1, 1] for signs in shuffled)
    with pytest.raises(ValueError, match=r"1\.\.3 latents, got 4"):
        latent_set.first(4)


def test_union_adds_what_is_new_and_refuses_contradictions(latent_set, sae) -> None:
    other = LatentSet.of(sae, [Candidate(latent=9, shift=1.0), Candidate(latent=1, shift=-1.0)], [1.0, 0.5])
    both = latent_set.union(other)
    assert both.latents == (5, 2, 9, 1) and both.scores == (0.9, 0.6, 0.3, 0.5) and both.selection_prompts == latent_set.selection_prompts
    assert latent_set.union(latent_set) == latent_set
    with pytest.raises(ValueError, match=r"latents \[9\] have opposite signs"):
        latent_set.union(LatentSet.of(sae, [Candidate(latent=9, shift=-1.0)], [1.0]))
    with pytest.raises(ValueError, match="two sets of one SAE"):
        latent_set.union(LatentSet.of(make_sae(1), CANDIDATES, [1.0] * 3))


def test_random_control_is_seeded_and_keeps_off_what_it_should(sae) -> None:
    draw = [random_latents(sae, 4, seed=s, among=range(8), exclude=[3]).latents for s in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2] and set(draw[0]) <= set(range(8)) - {3}
    with pytest.raises(ValueError, match="at least 8 latents to draw from, got 7"):
        random_latents(sae, 8, seed=0, among=range(8), exclude=[3])


def test_links_and_out_of_range(latent_set, sae) -> None:
    assert latent_set.links()[5].endswith("/llama3.1-8b/19-x/5")
    with pytest.raises(ValueError, match=r"got \[16\]"):
        LatentSet.of(sae, [Candidate(latent=16, shift=1.0)], [1.0])


def test_a_published_set_loads_by_name_anywhere_and_a_missing_one_names_them(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "organism/finance-20" in LatentSet.published()
    assert all(LatentSet.load(name, load_sae("organism")).provenance for name in LatentSet.published() if name.startswith("organism/"))
    with pytest.raises(FileNotFoundError, match=r"organism/x: there is no such latent set.*by name there are .*organism/finance-20"):
        LatentSet.load("organism/x")
    mine = LatentSet.load("organism/finance-20").first(3)
    mine.save("organism/finance-20")
    assert len(LatentSet.load("organism/finance-20")) == 3  # one's own file goes before
