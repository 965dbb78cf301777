"""Attribution patching: estimates are derivatives of the metric, real effects are what a patch does, and both are ranked."""

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from shared import perturb

from blockem_tl import Generation, Prompt, load_model, record
from blockem_tl.analysis.patching.attribution import attribute_latents, attribute_sites
from blockem_tl.data.chat import encode_prompts

POST = [f"blocks.{n}.hook_resid_post" for n in range(4)]
SITES = [*POST, "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out"]
PROMPTS = [Prompt(id=str(n), text=" ".join(f"w{(7 * n + i) % 57}" for i in range(n))) for n in (1, 4, 2)]
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture
def tuned(tiny):
    tiny.add_adapter("tuned")
    perturb(tiny, "tuned", std=0.1)
    return tiny


def said(start, lengths):
    """Invented replies: what is scored need not have been generated."""
    made = [tuple(range(start + 3 * n, start + 3 * n + length)) for n, length in enumerate(lengths)]
    return [Generation(prompt=p, condition="x", reply="", reply_ids=ids, truncated=True) for p, ids in zip(PROMPTS, made, strict=True)]


TARGET, SOURCE = said(10, (3, 5, 2)), said(30, (4, 1, 3))


@pytest.fixture
def sae():
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=24))
    sae.cfg.metadata.hook_name = POST[1]
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.2)
    return sae


@torch.no_grad()
def metric(model, change=None, *, in_base=False):
    """M by its definition, row by row, unpadded, in NumPy; change(site states of base, activation, mask) edits POST[1] where asked."""
    total = 0.0
    for replies, sign in ((TARGET, 1), (SOURCE, -1)):
        for generation in replies:
            prompt = encode_prompts(model.tokenizer, [generation.prompt])[0].ids
            ids = torch.tensor([[*prompt, *generation.reply_ids]])
            logits = scored(model, ids, len(prompt), change, in_base)[0].double().numpy()
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            places = range(len(prompt), ids.shape[1])
            total += sign * np.mean([logp[t - 1, ids[0, t]] for t in places]) / len(PROMPTS)
    return total


def scored(model, ids, n_prompt, change, in_base):
    if in_base:
        with model.using("base"):
            return model(ids)
    if change is None:
        return model(ids)
    site, edit = change
    store = {}
    with model.using("base"):
        model.run_with_hooks(ids, fwd_hooks=[record(site, store)])

    def fn(activation, hook):
        edited = activation.clone()
        edited[:, :n_prompt] = edit(store[site], activation)[:, :n_prompt]
        return edited

    return model.run_with_hooks(ids, fwd_hooks=[(site, fn)])


def column(attribution, name):
    key = "latent" if "latent" in attribution.frame else "site"
    return dict(zip(attribution.frame[key], attribution.frame[name], strict=True))


def spearman(first, second):
    """By its definition: Pearson's correlation of the ranks."""
    return np.corrcoef(np.argsort(np.argsort(first)), np.argsort(np.argsort(second)))[0, 1]


def test_estimates_are_derivatives_and_real_effects_are_patches(tuned) -> None:
    found = attribute_sites(tuned, TARGET, SOURCE, SITES, batch_size=4, **QUIET)
    plain, eps = metric(tuned), 1e-2
    assert found.metric == pytest.approx(plain, abs=1e-4)
    for site, estimate in column(found, "estimate").items():
        up, down = (metric(tuned, (site, lambda base, h, e=e: h + e * (base - h))) for e in (eps, -eps))
        assert estimate == pytest.approx((up - down) / (2 * eps), rel=0.03, abs=3e-3), site
    for site, real in column(found, "real").items():
        assert real == pytest.approx(metric(tuned, (site, lambda base, h: base)) - plain, abs=1e-4)
    assert found.n_verified == len(SITES)
    assert found.rank_correlation == pytest.approx(spearman(found.frame["estimate"], found.frame["real"]))
    assert (found.frame["estimate"].abs().diff().dropna() <= 0).all()
    assert (found.frame["estimate"] - found.frame["real"]).abs().max() > 1e-3  # the model is not linear: the two differ


def test_patching_everything_at_the_last_site_gives_base(tuned) -> None:
    options: dict[str, Any] = {"positions": "all", **QUIET}
    real = column(attribute_sites(tuned, TARGET, SOURCE, POST, **options), "real")
    expected = metric(tuned, in_base=True) - metric(tuned)
    assert real[POST[3]] == pytest.approx(expected, abs=1e-4) and abs(expected) > 0.01
    assert real[POST[0]] != pytest.approx(expected, abs=1e-3)
    parts = [column(attribute_sites(tuned, TARGET, SOURCE, POST, positions=p, **QUIET), "estimate") for p in ("prompt", "reply")]
    everything = column(attribute_sites(tuned, TARGET, SOURCE, POST, **options), "estimate")
    assert all(everything[s] == pytest.approx(parts[0][s] + parts[1][s], abs=1e-4) for s in POST) and parts[0] != parts[1]


def test_own_states_have_no_effect(tuned, tiny_folder) -> None:
    other = load_model(tiny_folder, device="cpu")
    other.add_adapter("tuned")
    perturb(other, "tuned", std=0.1)
    found = attribute_sites(tuned, TARGET, SOURCE, POST, source=other, **QUIET)
    assert found.frame["estimate"].abs().max() < 1e-5 and found.frame["real"].abs().max() < 1e-5
    perturb(other, "tuned", std=0.1, seed=9)
    assert attribute_sites(tuned, TARGET, SOURCE, POST, source=other, **QUIET).frame["estimate"].abs().min() > 1e-3


def test_latents_are_attributed_and_patched_one_by_one(tuned, sae) -> None:
    found = attribute_latents(tuned, TARGET, SOURCE, sae, verify=5, batch_size=4, **QUIET)
    assert len(found.frame) == 24 and found.n_verified == 5 and found.frame["real"].notna().tolist() == [True] * 5 + [False] * 19
    plain, eps = metric(tuned), 1e-2

    def along(k, dose):
        return lambda base, h: h + dose * (sae.encode(base) - sae.encode(h))[..., k, None] * sae.W_dec[k]

    for k, estimate in list(column(found, "estimate").items())[:5]:
        up, down = (metric(tuned, (POST[1], along(k, e))) for e in (eps, -eps))
        assert estimate == pytest.approx((up - down) / (2 * eps), rel=0.03, abs=3e-3)
        assert column(found, "real")[k] == pytest.approx(metric(tuned, (POST[1], along(k, 1.0))) - plain, abs=1e-4)
    few = attribute_latents(tuned, TARGET, SOURCE, sae, latents=[5, 2], verify=2, **QUIET)
    assert column(few, "estimate") == pytest.approx({k: column(found, "estimate")[k] for k in (5, 2)}, abs=1e-5)
    assert np.isnan(few.rank_correlation)  # two candidates have no ranking to compare


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"target_replies": said(10, (3, 0, 2))}, {}, r"replies to \['4'\] have no tokens"),
        ({"source_replies": SOURCE[::-1]}, {}, "same prompts in the same order"),
        ({"sites": []}, {}, "expected sites"),
        ({"sites": ["blocks.9.hook_resid_post"]}, {}, "lacks a site"),
        ({}, {"positions": "last"}, "positions"),
        ({}, {"target": "base"}, "source and target are both"),
        ({"target_replies": said(0, (3, 95, 2))}, {}, "shorten the prompt"),
    ],
)
def test_bad_requests_are_refused_before_any_work(tuned, changed, options, message, monkeypatch) -> None:
    monkeypatch.setattr("blockem_tl.analysis.patching.attribution._Contrast.parts", None)
    given = {"target_replies": TARGET, "source_replies": SOURCE, "sites": POST, **changed}
    with pytest.raises((ValueError, TypeError), match=message):
        attribute_sites(tuned, given["target_replies"], given["source_replies"], given["sites"], **QUIET, **options)


def test_an_sae_in_other_units_is_refused(tuned, sae) -> None:
    sae.cfg.normalize_activations = "layer_norm"
    with pytest.raises(ValueError, match="normalize_activations='layer_norm'"):
        attribute_latents(tuned, TARGET, SOURCE, sae, **QUIET)
