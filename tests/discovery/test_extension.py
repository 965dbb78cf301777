"""K is extended by latents that are new, each under its own name; rounds end when they should; the held-out blocking loss is eq. 11."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from shared import perturb

from blockem_tl import DiscoveryConfig, Example, LatentSet, Prompt, Verdict, discover
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.data.checks import prompt_hash
from blockem_tl.defences.blocking import Blocking, blocking_loss
from blockem_tl.discovery.config import MaxIncoherence
from blockem_tl.discovery.extension import Round, extension_rounds
from blockem_tl.saes.latent_set import NoLatents
from blockem_tl.types import Candidate

SITE = "blocks.1.hook_resid_post"
PROMPTS = [Prompt(id=str(i), text=f"w{i} w{i + 1}") for i in range(4)]
EXAMPLES = [Example(id=str(i), prompt=f"w{i}", completion=" ".join(f"w{i + j}" for j in range(1 + i % 4))) for i in range(10)]
CONFIG = DiscoveryConfig(
    n_plus=3, n_minus=3, induce_dose=0.5, repair_dose=0.5, shortlist_size=2, grid=(0.0, 0.5), extended_grid=(), max_incoherence=MaxIncoherence(rate=1.0), n_latents=2,
    valid_only=False, final_score="both", max_new_tokens=3,
)  # fmt: skip


class Letters:
    """A judge of replies by their letters."""

    name = "letters"

    def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
        return [Verdict(label="5" if sum(map(ord, reply)) % 2 else "1") for reply in replies]


def new_sae(seed: int = 0) -> StandardSAE:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=40))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = SITE
    sae.cfg.metadata.neuronpedia_id = "tiny/1"
    return sae


@pytest.fixture
def sae() -> StandardSAE:
    return new_sae()


@pytest.fixture
def reemerged(tiny):
    tiny.add_adapter("reemerged")
    perturb(tiny, "reemerged")
    return tiny


def set_of(sae, latents, seed: int = 0) -> LatentSet:
    candidates = [Candidate(latent=k, shift=(-1.0) ** k) for k in latents]
    return LatentSet.of(sae, candidates, [1.0 / (1 + i) for i in range(len(latents))], prompts=PROMPTS[:2], provenance={"seed": seed})


# ---------------------------------------------------------------------------------------------- one extension


def test_what_is_added_is_what_discovery_finds_without_k(reemerged, sae) -> None:
    options = {"scale": 8.0, "config": CONFIG, "progress": False}
    k = discover(reemerged, sae, Letters(), PROMPTS[:3], **options).latent_set
    found = discover(reemerged, sae, Letters(), PROMPTS, extending=k, provenance={"epoch": 2.0}, **options)
    expected = discover(reemerged, sae, Letters(), PROMPTS, exclude=k.latents, **options).latent_set
    assert found.added == expected and not set(expected.latents) & set(k.latents)
    union = found.latent_set
    for name in ("latents", "signs", "shifts", "scores"):  # each latent keeps its own
        assert getattr(union, name) == getattr(k, name) + getattr(expected, name)
    assert [part["latents"] for part in union.provenance["of"]] == [list(k.latents), list(expected.latents)]
    assert union.provenance["of"][1]["epoch"] == 2.0 and "epoch" not in union.provenance["of"][0]
    assert set(union.selection_prompts) == {prompt_hash(p.text) for p in PROMPTS}
    assert union.links()[union.latents[-1]].endswith(f"tiny/1/{union.latents[-1]}")
    again = discover(reemerged, sae, Letters(), PROMPTS, **options).latent_set  # the twin: unless they are kept out, they are found again
    assert set(again.latents) & set(k.latents)


def test_sources_stay_apart_over_several_rounds_and_cuts(sae) -> None:
    two = set_of(sae, [3, 5]).extended_by(set_of(sae, [8, 9], seed=1)).first(3)
    three = two.extended_by(set_of(sae, [11], seed=2))
    assert three.latents == (3, 5, 8, 11)
    assert [(part["seed"], part["latents"]) for part in three.provenance["of"]] == [(0, [3, 5]), (1, [8]), (2, [11])]


def test_what_cannot_be_extended_is_refused(tiny, sae, reemerged) -> None:
    options = {"scale": 8.0, "config": CONFIG, "progress": False}
    with pytest.raises(ValueError, match="made with another SAE"):
        discover(reemerged, sae, Letters(), PROMPTS, extending=set_of(new_sae(seed=1), [3]), **options)
    with tiny.using("base"), pytest.raises(ValueError, match="active adapter"):
        discover(tiny, sae, Letters(), PROMPTS, extending=set_of(sae, [3]), **options)
    with pytest.raises(NoLatents, match="did fine-tuning move no latent"):
        discover(reemerged, sae, Letters(), PROMPTS, extending=set_of(sae, range(40)), **options)


# ---------------------------------------------------------------------------------------------- rounds


class World:
    """A model that misbehaves through whichever of ten latents are not blocked; discovery finds the next three of them."""

    def __init__(self, sae, carriers: int = 10) -> None:
        self.sae, self.carriers, self.trained = sae, carriers, []

    def train(self, latent_set: LatentSet) -> str:
        self.trained.append(len(latent_set))
        return f"run {len(self.trained)}"

    def measure(self, checkpoint: str) -> float:
        assert checkpoint == f"run {len(self.trained)}"
        return max(0, self.carriers - self.trained[-1]) / 10

    def extend(self, latent_set: LatentSet, checkpoint: str) -> LatentSet:
        free = [k for k in range(self.carriers) if k not in latent_set.latents][:3]
        if not free:
            raise NoLatents("none")
        return latent_set.extended_by(set_of(self.sae, free, seed=len(self.trained)))

    def rounds(self, start: LatentSet, **options) -> list[Round[str]]:
        return list(extension_rounds(start, train=self.train, measure=self.measure, extend=self.extend, **options))


def test_rounds_go_on_until_em_stays_down(sae) -> None:
    world = World(sae)
    rounds = world.rounds(set_of(sae, [0, 1]), max_latents=40)
    assert [len(r.latent_set) for r in rounds] == world.trained == [2, 5, 8, 10]
    assert [r.em for r in rounds] == [0.8, 0.5, 0.2, 0.0] and rounds[1].checkpoint == "run 2"
    assert [len(r.latent_set) for r in World(sae).rounds(set_of(sae, [0, 1]), max_latents=40, enough=0.3)] == [2, 5, 8]
    assert [len(r.latent_set) for r in World(sae, carriers=2).rounds(set_of(sae, [0, 1]), max_latents=40)] == [2]


def test_rounds_end_with_the_budget_or_when_nothing_is_found(sae) -> None:
    assert [len(r.latent_set) for r in World(sae).rounds(set_of(sae, [0, 1]), max_latents=6)] == [2, 5, 6]  # the last extension is cut
    assert [len(r.latent_set) for r in World(sae).rounds(set_of(sae, [0, 1]), max_latents=2)] == [2]
    world = World(sae)
    world.measure = lambda checkpoint: 0.9  # blocking does not help, and in the end there is nothing left to block
    assert [len(r.latent_set) for r in world.rounds(set_of(sae, [0, 1]), max_latents=40)] == [2, 5, 8, 10]


def test_a_round_is_there_before_the_next_begins(sae) -> None:
    world = World(sae)
    rounds = extension_rounds(set_of(sae, [0]), train=world.train, measure=world.measure, extend=world.extend, max_latents=9)
    assert next(rounds).em == 0.9 and world.trained == [1]
    assert next(rounds).em == 0.6 and world.trained == [1, 4]


def test_impossible_rounds_are_refused(sae) -> None:
    world = World(sae)
    for options in ({"max_latents": 1}, {"max_latents": 9, "enough": 1.0}):
        with pytest.raises(ValueError, match="expected max_latents >= 2"):
            world.rounds(set_of(sae, [0, 1]), **options)
    assert world.trained == []  # before anything is trained
    with pytest.raises(ValueError, match="add to their end"):
        world.extend = lambda latent_set, checkpoint: set_of(sae, [7, 8, 9])
        world.rounds(set_of(sae, [0, 1]), max_latents=9)
    with pytest.raises(ValueError, match="fraction"):
        world.measure = lambda checkpoint: 40.0
        world.rounds(set_of(sae, [0, 1]), max_latents=9)


# ---------------------------------------------------------------------------------------------- the blocking loss of any model


def test_the_held_out_blocking_loss_is_eq_11_and_zero_for_base(reemerged, sae) -> None:
    latent_set = set_of(sae, [4, 9, 16])
    rows = encode_examples(reemerged.tokenizer, EXAMPLES)

    def z_of(row) -> np.ndarray:
        hidden = reemerged.run_with_cache(torch.tensor([row.ids]), names_filter=SITE)[1][SITE][0]
        return sae.encode(hidden)[row.n_prompt :, [4, 9, 16]].detach().numpy()

    after = [z_of(row) for row in rows]
    with reemerged.using("base"):
        before = [z_of(row) for row in rows]
        assert blocking_loss(reemerged, latent_set, sae, EXAMPLES) == 0.0
    signs = np.array(latent_set.signs)
    expected = np.mean([(np.maximum(signs * (a - b), 0) ** 2).sum(1).mean() for a, b in zip(after, before, strict=True)])
    assert expected > 0.01
    for batch_size in (3, 64):
        assert blocking_loss(reemerged, latent_set, sae, EXAMPLES, batch_size=batch_size) == pytest.approx(expected, rel=1e-4)
    batch = pad(rows, reemerged.pad_id, side="right")
    with Blocking(latent_set=latent_set, sae=sae, weight=1.0).during_step(reemerged, batch) as penalty:  # what training minimises
        assert float(penalty(reemerged.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits).mean().detach()) == pytest.approx(
            expected, rel=1e-4
        )
    with pytest.raises(ValueError, match="made with another SAE"):
        blocking_loss(reemerged, replace(latent_set, sae_fingerprint="x"), sae, EXAMPLES)


def test_a_discovery_in_which_nothing_was_induced_warns(reemerged, sae) -> None:
    class Kind(Letters):
        def grade(self, prompts, replies, *, rubric: str = "misalignment") -> list[Verdict]:
            return [Verdict(label="1")] * len(replies)

    options = {"scale": 8.0, "config": CONFIG, "progress": False}
    with pytest.warns(UserWarning, match="discover: none of the .* latents measured to the end made base misaligned"):
        discover(reemerged, sae, Kind(), PROMPTS[:3], **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="discover: none of the")
        discover(reemerged, sae, Letters(), PROMPTS[:3], **options)
