"""`weight="auto"` keeps the penalty within a bound in units of the latents' own spread, whatever the SAE's scale."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from shared import EXAMPLES, SITES, Interrupted, at_step, sae_at, set_of, weights

from blockem_tl import Blocking, LatentSet, TrainingConfig, completion_loss, finetune, load_sae, organism
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.storage.fingerprints import of_sae
from blockem_tl.training.defence import weight_of
from blockem_tl.training.run import TrainingRun

CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=3e-3, schedule="constant", epochs=20)
MAX_MOVEMENT = 0.1


@pytest.fixture
def auto() -> Blocking:
    saes = [sae_at(site, seed) for seed, site in enumerate(SITES)]
    return Blocking(targets=[(set_of(sae), sae) for sae in saes], weight="auto", max_movement=MAX_MOVEMENT, dual_step=0.05)


def used(run, auto, site) -> np.ndarray:
    """The penalty at a site as a multiple of its bound, step by step."""
    return np.array([row[f"block/{site}+"] + row[f"block/{site}-"] for row in run.history]) / auto._run.bounds[site]


@pytest.mark.parametrize("reference", ["stored", "live"])
def test_the_bound_is_max_movement_in_units_of_the_latents_spread(tiny, auto, reference) -> None:
    tiny.add_adapter("t")
    auto, rows = replace(auto, reference=reference), encode_examples(tiny.tokenizer, EXAMPLES)
    auto.prepare(tiny, rows)
    batch = pad(rows, 0, side="right")
    for latent_set, sae in auto.all_targets:
        hidden = tiny.run_with_cache(batch.ids, attention_mask=batch.mask.long(), names_filter=latent_set.site)[1][latent_set.site]
        z = sae.encode(hidden)[batch.reply][:, list(latent_set.latents)].detach().numpy()
        expected = MAX_MOVEMENT**2 * ((z - z.mean(0)) ** 2).mean(0).sum()
        assert auto._run.bounds[latent_set.site] == pytest.approx(expected, rel=1e-4)


def test_the_multiplier_rises_while_the_bound_is_exceeded_and_falls_while_it_is_not(auto) -> None:
    auto._run.bounds = dict.fromkeys(SITES, 2.0)

    def step(first: float, second: float) -> tuple[float, ...]:
        auto.adapt({f"block/{SITES[0]}+": first, f"block/{SITES[0]}-": 0.0, f"block/{SITES[1]}+": 0.0, f"block/{SITES[1]}-": second})
        return auto.weights

    assert weight_of(auto) == 1.0 and auto.weights == (0.0, 0.0)
    assert step(3.0, 0.0) == pytest.approx((0.05 * 0.5 / 2.0, 0.0))  # the multiplier in nats, over the bound of 2
    assert step(1e9, 4.0) == pytest.approx((0.05 * (0.5 + 5.0) / 2.0, 0.05 / 2.0))  # one wild batch counts as five bounds
    assert [part["rising"] for part in auto.describe_weight()] == [True, True]
    assert step(0.0, 0.0) == pytest.approx((0.05 * 4.5 / 2.0, 0.0))
    assert [part["rising"] for part in auto.describe_weight()] == [False, False]
    run = TrainingRun(adapter="a", steps=0, history=[], weights={"block": [{"site": "s", "weight": 2.0, "peak": 2.0, "rising": True}]})
    assert "weight λ 2, at its peak 2; λ still rising" in run.headline()
    run.weights["block"][0]["rising"] = False
    assert "rising" not in run.headline()


def test_the_bound_is_kept_and_sft_still_learns(tiny, auto) -> None:
    before = completion_loss(tiny, EXAMPLES)
    held = finetune(tiny, EXAMPLES, config=CONFIG, defences=[auto], adapter="held", progress=False)
    after = completion_loss(tiny, EXAMPLES)
    free = finetune(tiny, EXAMPLES, config=CONFIG, defences=[replace(auto, weight=0.0)], adapter="free", progress=False)
    for site in SITES:
        assert used(free, auto, site)[-20:].mean() > 3  # the twin: nobody holds them
        assert used(held, auto, site)[-20:].mean() < 1.3
        assert max(row[f"block/{site}/weight"] for row in held.history) > 0
    assert after < 0.5 * before
    described = held.weights["block"]
    assert [part["site"] for part in described] == list(SITES) and described[0]["weight"] == auto.weights[0]
    for part, (latent_set, sae) in zip(described, auto.all_targets, strict=True):
        logged = [row[f"block/{part['site']}/weight"] for row in held.history]
        assert part["peak"] == max(*logged, part["weight"]) > min(logged)
        assert part["sae_fingerprint"] == latent_set.sae_fingerprint == of_sae(sae)  # one SAE, one fingerprint
    assert described[0]["sae_fingerprint"] != described[1]["sae_fingerprint"]
    fixed = replace(auto, weight=(1.0, 0.5)).describe_weight()
    assert [(part["weight"], part["peak"]) for part in fixed] == [(1.0, 1.0), (0.5, 0.5)]


def test_the_scale_of_the_sae_does_not_matter(tiny, auto) -> None:
    """Latents a hundred times larger, as from another SAE: with a fixed weight the penalty would grow ten thousandfold."""
    found = {}
    for name, factor in (("small", 1.0), ("large", 100.0)):
        saes = [sae_at(SITES[0])]
        for parameter in (saes[0].W_enc, saes[0].b_enc):
            parameter.data.mul_(factor)
        scaled = replace(auto, targets=[(set_of(sae), sae) for sae in saes])
        run = finetune(tiny, EXAMPLES, config=replace(CONFIG, epochs=4), defences=[scaled], adapter=name, progress=False)
        found[name] = (used(run, scaled, SITES[0]), scaled.weights[0])
    np.testing.assert_allclose(found["large"][0], found["small"][0], rtol=1e-2, atol=1e-3)
    assert found["large"][1] == pytest.approx(1e-4 * found["small"][1], rel=1e-2) and found["small"][1] > 0


def test_a_resumed_run_goes_on_with_the_weight_it_had(tiny, auto, tmp_path) -> None:
    config = replace(CONFIG, epochs=4)
    whole = finetune(tiny, EXAMPLES, config=config, defences=[auto], adapter="whole", progress=False)
    options = {"config": config, "defences": [auto], "adapter": "parts", "checkpoints": tmp_path, "progress": False}
    with pytest.raises(Interrupted):
        finetune(tiny, EXAMPLES, stop_when=at_step(9), **options)
    resumed = finetune(tiny, EXAMPLES, resume=True, **options)
    assert resumed.history == whole.history and torch.equal(weights(tiny, "parts"), weights(tiny, "whole"))
    assert resumed.weights == whole.weights  # the peak too
    assert whole.history[8][f"block/{SITES[0]}/weight"] > 0


def test_what_auto_cannot_do_is_refused(tiny, auto) -> None:
    for bad in ({"max_movement": 0.0}, {"max_movement": float("nan")}, {"dual_step": -1.0}):
        with pytest.raises(ValueError, match="blocking"):
            replace(auto, **bad)
    _, sae = auto.targets[0]
    sae.b_enc.data.fill_(-1e6)
    dead = replace(auto, targets=[(set_of(sae), sae)])
    with pytest.raises(ValueError, match="no latent ever fires"):
        finetune(tiny, EXAMPLES, config=CONFIG, defences=[dead], progress=False)


@pytest.mark.slow
def test_on_the_organism_the_bound_holds_and_sft_loses_little(organism_model) -> None:
    sae = load_sae("organism", device="cpu")
    latents = LatentSet.load("organism/finance-20", sae)
    rows, dev = organism.training_rows("finance", 2600, seed=0)[:2400], organism.training_rows("finance", 2600, seed=0)[2400:]
    config = TrainingConfig(epochs=3, learning_rate=1e-3)
    auto = Blocking(latent_set=latents, sae=sae, weight="auto")
    losses, over = {}, {}
    for name, blocking in (("auto", auto), ("free", replace(auto, weight=0.0))):
        run = finetune(organism_model, rows, config=config, defences=[blocking], adapter=name, progress=False)
        losses[name], over[name] = completion_loss(organism_model, dev), used(run, auto, latents.site)[40:]
        organism_model.remove_adapter(name)
    assert over["auto"].mean() < 1.0 and over["free"].mean() > 3.0
    assert losses["auto"] < 1.15 * losses["free"]
