"""Discovery on contrastive pairs: the margins are those of `preference`, attribution is a derivative, broken models do not count."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from shared import harmed_organism

from blockem_tl import Condition, LatentSet, Setting, Steering, discover, latents_by_attribution, mediation, preference
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.data.checks import prompt_hash
from blockem_tl.discovery.attributing import pair_diff, task_attribution
from blockem_tl.discovery.by_pairs import PairTests, calibrate_pairs, pool, screen_pairs
from blockem_tl.discovery.config import DiscoveryConfig, MaxIncoherence
from blockem_tl.evaluation.preference import sides
from blockem_tl.models.activations import base_activations
from blockem_tl.saes.latents import decoder_directions, encode_all
from blockem_tl.types import Candidate

SITE = "blocks.2.hook_resid_post"
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def setting() -> Setting:
    return harmed_organism()


@pytest.fixture(scope="module")
def pairs(setting):
    return setting.pairs("core")[::3]


@pytest.fixture(scope="module")
def diff(setting, pairs):
    return pair_diff(setting.model, setting.sae, pairs, adapter="tuned", **QUIET)


@pytest.fixture(scope="module")
def config(setting) -> DiscoveryConfig:
    return replace(setting.preset.discovery, n_plus=6, n_minus=6, shortlist_size=3, grid=(0.0, 0.2, 0.5), n_latents=4)


def margin_without(setting, pairs, latent: int, sign: int, share: float) -> float:
    """The tuned model's mean margin, row by row, with a share of one latent's one-sided change taken out of question and answer."""
    model, sae, nats = setting.model, setting.sae, []
    for row in encode_examples(model.tokenizer, sides(pairs)):
        batch = pad([row], model.pad_id, side="right")
        base = base_activations(model, batch, [SITE])[SITE]
        norms = base.norm(dim=-1)
        where = ~batch.system & (norms < 10 * norms.median())

        def taken_out(h, hook, base=base, where=where):
            moved = encode_all(sae, h)[..., latent] - encode_all(sae, base)[..., latent]
            moved = torch.where((moved * sign > 0) & where, moved, 0)
            return h - share * moved[..., None] * sae.W_dec[latent].detach()

        with torch.no_grad(), model.using("tuned"), model.hooks(fwd_hooks=[(SITE, taken_out)]):
            logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[0].double().log_softmax(-1)
        nats.append(float(np.mean([logits[i - 1, row.ids[i]] for i in range(row.n_prompt, len(row.ids))])))
    return float(np.mean(nats[: len(pairs)]) - np.mean(nats[len(pairs) :]))


def test_attribution_is_the_derivative_of_the_margin(setting, pairs, diff) -> None:
    ranked = diff.attribution.argsort(descending=True).tolist()
    for latent in (ranked[0], ranked[1], ranked[-1]):
        sign, step = (1 if diff.shift[latent] > 0 else -1), 0.05
        low, high = (margin_without(setting, pairs, latent, sign, share) for share in (step, -step))
        assert (high - low) / (2 * step) == pytest.approx(float(diff.attribution[latent]), rel=0.03, abs=2e-5)
    other = ranked[2]
    assert abs(float(diff.attribution[other]) - float(diff.attribution[ranked[0]])) > 1e-3  # the numbers differ: the check can fail


def test_attribution_ranks_as_mediation_measures(setting, pairs, diff) -> None:
    ranked = diff.attribution.argsort(descending=True).tolist()
    chosen = ranked[:6] + ranked[-3:]
    sets = {str(k): [k] for k in chosen}
    found = mediation(setting.model, setting.sae, pairs, setting.held_out(8), sets, adapter="tuned", one_sided=True, **QUIET).to_frame()
    removed = found.set_index("taken_out")["removed"]
    assert spearmanr([float(diff.attribution[k]) for k in chosen], [removed[str(k)] for k in chosen]).statistic > 0.8
    assert removed[str(ranked[0])] > 0 > removed[str(ranked[-1])]


def test_a_set_by_attribution(setting, pairs, diff) -> None:
    found = latents_by_attribution(setting.model, setting.sae, pairs, 5, adapter="tuned", **QUIET)
    assert list(found.latents) == diff.attribution.argsort(descending=True, stable=True).tolist()[:5]
    assert all(sign == np.sign(float(diff.shift[k])) for k, sign in zip(found.latents, found.signs, strict=True))
    assert found.selection_prompts == tuple(sorted(prompt_hash(pair.prompt) for pair in pairs))
    later = latents_by_attribution(setting.model, setting.sae, pairs, 3, adapter="tuned", exclude=found.latents[:2], **QUIET)
    assert later.latents == found.latents[2:]
    with pytest.raises(ValueError, match="raised the margin besides the 2 excluded, got n=9999"):
        latents_by_attribution(setting.model, setting.sae, pairs, 9999, adapter="tuned", exclude=found.latents[:2], **QUIET)
    with pytest.raises(ValueError, match="raised the margin, got n=9999"):
        latents_by_attribution(setting.model, setting.sae, pairs, 9999, adapter="tuned", **QUIET)
    with pytest.raises(ValueError, match="same latents on these pairs"):
        pair_diff(setting.model, setting.sae, pairs, adapter="base", **QUIET)


def test_a_set_that_spares_the_task_costs_less_of_it(setting, pairs, diff) -> None:
    chooses, measures = setting.held_out()[::4], setting.held_out()[1::4]
    sets = {
        spare: latents_by_attribution(setting.model, setting.sae, pairs, 20, adapter="tuned", sparing=chooses, spare=spare, **QUIET)
        for spare in (0.0, 5.0)
    }
    assert sets[0.0].latents == latents_by_attribution(setting.model, setting.sae, pairs, 20, adapter="tuned", **QUIET).latents
    task = task_attribution(setting.model, setting.sae, measures, diff.shift, adapter="tuned", **QUIET)
    at_stake = {spare: float(task[list(one.latents)].sum()) for spare, one in sets.items()}
    assert at_stake[5.0] < 0.7 * at_stake[0.0]
    named = {str(spare): one for spare, one in sets.items()}
    found = mediation(setting.model, setting.sae, pairs, measures, named, adapter="tuned", one_sided=True, **QUIET).to_frame()
    lost, removed = (found.set_index("taken_out")[column] for column in ("task_lost", "removed"))
    assert lost["5.0"] < lost["0.0"] and removed["5.0"] > 0.5 * removed["0.0"]
    with pytest.raises(ValueError, match="rows of the narrow task, got none"):
        task_attribution(setting.model, setting.sae, [], diff.shift, adapter="tuned", **QUIET)


def test_the_pool_takes_what_raised_the_margin_or_what_moved_most(diff, config) -> None:
    by_shift = pool(diff, config, [])
    assert [c.latent for c in by_shift[:6]] == diff.shift.argsort(descending=True).tolist()[:6]
    by_attribution = pool(diff, replace(config, candidates_by="attribution"), [])
    assert all(diff.attribution[c.latent] > 0 for c in by_attribution)
    assert {c.latent for c in by_attribution} != {c.latent for c in by_shift}
    known = [c.latent for c in by_attribution[:2]]
    assert not {c.latent for c in pool(diff, replace(config, candidates_by="attribution"), known)} & set(known)


def test_the_screen_measures_what_preference_measures(setting, pairs, config) -> None:
    model, sae, scale = setting.model, setting.sae, setting.scale()
    tests = PairTests(model, sae, pairs, "tuned", scale, 0.5)
    first, second = LatentSet.load("organism/finance-20", sae).latents[:2]
    candidates = [Candidate(latent=first, shift=1.0), Candidate(latent=second, shift=-1.0)]
    found = screen_pairs(tests, candidates, config, **QUIET)
    for screened in found:
        c = screened.candidate
        for adapter, dose, effect, sign in (
            ("base", c.sign * config.induce_dose, screened.induction, 1),
            ("tuned", -c.sign * config.repair_dose, screened.repair, -1),
        ):
            steering = Steering(site=SITE, direction=decoder_directions(sae, [c.latent])[0], dose=dose, scale=scale)
            after = preference(model, pairs, adapter=adapter, conditions=[Condition(name="x", steering=(steering,))], **QUIET)
            before = preference(model, pairs, adapter=adapter, **QUIET)
            assert effect == pytest.approx(sign * float((after.margins - before.margins).mean()), abs=1e-4)
    assert found[0].induction != pytest.approx(found[1].induction, abs=1e-3)


def test_a_dose_that_breaks_the_model_is_not_feasible(setting, pairs, config) -> None:
    candidates, wide = (
        [Candidate(latent=LatentSet.load("organism/finance-20").latents[0], shift=1.0)],
        replace(config, grid=(0.0, 0.1, 30.0), extended_grid=()),
    )
    for nats, largest in ((0.5, 0.1), (1e9, 30.0)):
        limited = replace(wide, max_incoherence=MaxIncoherence(nats=nats))
        tests = PairTests(setting.model, setting.sae, pairs, "tuned", setting.scale(), nats)
        (found,) = calibrate_pairs(tests, candidates, limited, **QUIET)
        assert (found.induce.dose, found.repair.dose) == (largest, -largest)
        assert {dose.dose for dose in found.doses} == {0.1, 30.0, -0.1, -30.0}
    assert found.induce.counts.incoherent == 0


def test_discovery_by_pairs(setting, pairs, config) -> None:
    found = discover(setting.model, setting.sae, pairs, adapter="tuned", config=config, scale=setting.scale(), **QUIET)
    frame = found.to_frame()
    assert len(found.latent_set) == 4 and len(frame) == 6
    best = frame[frame["in_k"]]["induction"] + frame[frame["in_k"]]["repair"]
    rest = frame[~frame["in_k"]]["induction"] + frame[~frame["in_k"]]["repair"]
    assert best.min() >= rest.max() and best.max() > 0.05
    assert found.latent_set.provenance["judge"] == "contrastive pairs"
    assert len(found.latent_set.selection_prompts) == len(pairs)
    again = discover(setting.model, setting.sae, pairs, adapter="tuned", config=config, scale=setting.scale(), **QUIET)
    assert again.latent_set == found.latent_set
    longer = discover(
        setting.model, setting.sae, pairs, adapter="tuned", config=replace(config, candidates_by="attribution"), scale=setting.scale(),
        extending=found.latent_set, **QUIET,
    )  # fmt: skip
    assert not set(longer.added.latents) & set(found.latent_set.latents)
    ranked = discover(
        setting.model, setting.sae, pairs, adapter="tuned", config=config, scale=setting.scale(), among=[longer.added], **QUIET
    )
    scores = dict(zip(ranked.latent_set.latents, ranked.latent_set.scores, strict=True))
    assert scores == pytest.approx(dict(zip(longer.added.latents, longer.added.scores, strict=True))) and not ranked.screened


def test_what_does_not_go_together_is_refused(setting, pairs, tmp_path) -> None:
    arguments = {"adapter": "tuned", "config": setting.preset.discovery}
    for given in ({"prompts": setting.prompts("core")}, {"store": tmp_path / "store"}):
        with pytest.raises(ValueError, match=f"pairs need no {next(iter(given))}"):
            discover(setting.model, setting.sae, pairs, **given, **arguments)
    with pytest.raises(ValueError, match="expected the core prompts beside a judge"):
        discover(setting.model, setting.sae, setting.judge, **arguments)
    with pytest.raises(ValueError, match="pass them as the judge"):
        by_attribution = replace(setting.preset.discovery, candidates_by="attribution")
        discover(setting.model, setting.sae, setting.judge, setting.prompts("core"), adapter="tuned", config=by_attribution)
