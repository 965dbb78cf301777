"""The diagnosis equals NumPy on unpadded rows; shares suppressed mean what they say; and what stays put has no share."""

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE
from shared import EXAMPLES as MANY
from shared import SITES, perturb, sae_at

from blockem_tl import LatentSet, Prompt, diagnose_rerouting, returning_sites, shift_by_site
from blockem_tl.data.chat import encode_examples
from blockem_tl.types import Candidate
from blockem_tl.views import plots

SITE, EXAMPLES = SITES[0], MANY[:7]
K, SIGNS = [4, 9, 16, 21], np.array([1, -1, 1, -1])
REST = [k for k in range(48) if k not in K]
POST = [f"blocks.{n}.hook_resid_post" for n in range(4)]
ROLES = ("system", "prompt", "reply")
ARMS = {"plain": "one", "blocked": "two", "progress": False}


@pytest.fixture
def sae() -> SAE:
    return sae_at(SITE)


@pytest.fixture
def latent_set(sae) -> LatentSet:
    return LatentSet.of(sae, [Candidate(latent=k, shift=float(sign)) for k, sign in zip(K, SIGNS, strict=True)], [0.0] * 4)


@pytest.fixture
def model(tiny):
    for seed, name in enumerate(("one", "two")):
        tiny.add_adapter(name, rank=4)
        perturb(tiny, name, seed=seed)
    return tiny


def states(model, role: str, site: str = SITE) -> list[np.ndarray]:
    """The activations of one role's tokens, one array per row, unpadded."""
    found = []
    for row in encode_examples(model.tokenizer, EXAMPLES):
        span = {"system": slice(0, row.n_system), "prompt": slice(row.n_system, row.n_prompt), "reply": slice(row.n_prompt, None)}[role]
        found.append(model.run_with_cache(torch.tensor([row.ids]), names_filter=site)[1][site][0, span].detach().double().numpy())
    return found


def of_arms(model, role: str, site: str = SITE) -> list[list[np.ndarray]]:
    """Base's, plain's and blocked's."""
    with model.using("base"):
        found = [states(model, role, site)]
    for name in ("one", "two"):
        with model.using(name):
            found.append(states(model, role, site))
    return found


def relu_latents(sae, h: np.ndarray) -> np.ndarray:
    w_enc, b_enc, b_dec = (getattr(sae, name).detach().double().numpy() for name in ("W_enc", "b_enc", "b_dec"))
    return np.maximum((h - b_dec) @ w_enc + b_enc, 0)


def average(values) -> np.ndarray:
    """Over rows, of means over each row's tokens."""
    return np.mean([np.mean(row, axis=0) for row in values], axis=0)


def of(frame: pd.DataFrame, **chosen) -> pd.DataFrame:
    for column, value in chosen.items():
        frame = frame[frame[column] == value]
    return frame


def minus(after, before) -> list[np.ndarray]:
    return [a - b for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("role", ROLES)
def test_every_number_equals_a_numpy_restatement(model, sae, latent_set, role) -> None:
    found = diagnose_rerouting(model, sae, latent_set, EXAMPLES, batch_size=5, **ARMS)
    h = of_arms(model, role)
    z = [[relu_latents(sae, row) for row in rows] for rows in h]
    w_dec = sae.W_dec.detach().double().numpy()[K]
    inside = w_dec.T @ np.linalg.pinv(w_dec.T)  # the projection onto the span of K's decoder rows
    mine, sides = of(found.blocked, role=role), {}
    assert list(mine["latent"]) == K and list(mine["sign"]) == list(SIGNS) and set(mine["link"]) == {None}
    spread = np.sqrt(average([row**2 for row in z[0]]) - average(z[0]) ** 2)
    for arm, after_h, after_z in zip(("plain", "blocked"), h[1:], z[1:], strict=True):
        dz, dh = minus(after_z, z[0]), minus(after_h, h[0])
        mean_z, mean_h = average(dz), average(dh)
        sides[arm] = average([np.maximum(SIGNS * row[:, K], 0) for row in dz])
        np.testing.assert_allclose(mine[arm], SIGNS * mean_z[K], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(mine[f"{arm}_one_sided"], sides[arm], rtol=1e-3, atol=1e-5)
        share = of(found.shares, role=role, arm=arm).iloc[0]
        expected = {
            "n_rows": len(EXAMPLES),
            "n_tokens": sum(map(len, h[0])),
            "latent_shift": np.linalg.norm(mean_z),
            "outside_l2": (mean_z[REST] ** 2).sum() / (mean_z**2).sum(),
            "outside_l1": np.abs(mean_z[REST]).sum() / np.abs(mean_z).sum(),
            "outside_l2_tokens": average([(row[:, REST] ** 2).sum(-1) for row in dz]) / average([(row**2).sum(-1) for row in dz]),
            "latent_chance": 1 - 4 / 48,
            "residual_shift": np.linalg.norm(mean_h),
            "residual_outside": 1 - ((inside @ mean_h) ** 2).sum() / (mean_h**2).sum(),
            "residual_outside_tokens": 1
            - average([((row @ inside) ** 2).sum(-1) for row in dh]) / average([(row**2).sum(-1) for row in dh]),
            "residual_chance": 1 - 4 / 32,
            "k_moved": sides[arm].sum(),
        }
        np.testing.assert_allclose(share[list(expected)].astype(float), list(expected.values()), rtol=1e-3)
        outside = of(found.outside, role=role)
        np.testing.assert_allclose(outside[arm], mean_z[outside["latent"]], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(mine["spread"], spread[K], rtol=1e-3, atol=1e-4)
    blocked = np.abs(average(minus(z[2], z[0])))
    assert list(outside["latent"]) == sorted(REST, key=lambda k: -blocked[k])[:20]
    suppressed = 1 - sides["blocked"].sum() / sides["plain"].sum()
    np.testing.assert_allclose(of(found.shares, role=role)["suppressed"], [0.0, suppressed], rtol=1e-3, atol=1e-6)
    for ending in ("", "_one_sided"):
        before, after = mine[f"plain{ending}"].to_numpy(), mine[f"blocked{ending}"].to_numpy()
        known = before > 1e-3 * sides["plain"].max()
        np.testing.assert_allclose(mine[f"suppressed{ending}"], np.where(known, 1 - after / np.where(known, before, 1), np.nan), rtol=1e-4)


def scaled(model, factor: float) -> None:
    """Give "two" the adapter "one" with its effect multiplied, to first order."""
    for name, parameter in model.hf.named_parameters():
        if ".two.weight" in name:
            source = dict(model.hf.named_parameters())[name.replace(".two.", ".one.")]
            parameter.data = source.data * (factor if "lora_B" in name else 1.0)


def test_a_blocked_model_that_moves_less_is_suppressed_and_one_like_plain_is_not(model, sae, latent_set) -> None:
    perturb(model, "one", std=0.03)
    shares = {}
    for factor in (1.0, 0.25, 0.0, -1.0):
        scaled(model, factor)
        found = diagnose_rerouting(model, sae, latent_set, EXAMPLES, **ARMS)
        shares[factor] = of(found.shares, arm="blocked", role="reply").iloc[0]["suppressed"]
        depth = of(shift_by_site(model, EXAMPLES, **ARMS).frame, role="reply")
        if factor in (1.0, 0.0):
            assert shares[factor] == pytest.approx(1 - factor)
            np.testing.assert_allclose(depth["returned"], factor, atol=1e-6)
        if factor == 0.0:
            assert found.blocked["blocked"].eq(0).all() and depth["cosine"].isna().all() and depth["ratio"].eq(0).all()
            assert of(found.shares, arm="blocked")["outside_l2"].isna().all()  # no shift, so no share of it
        elif factor == -1.0:
            turned = found.blocked[(found.blocked["plain"] > 0.01) & (found.blocked["blocked"] < -0.01)]
            assert len(turned) and turned["suppressed"].gt(1).all() and turned["suppressed_one_sided"].le(1).all()
            assert depth["returned"].lt(0).all()
    assert 0.4 < shares[0.25] < 0.95


def test_a_latent_that_plain_did_not_move_has_no_share(model, sae, latent_set) -> None:
    sae.b_enc.data[9] = -1e6  # it never fires
    latent_set = LatentSet.of(sae, [Candidate(latent=k, shift=float(s)) for k, s in zip(K, SIGNS, strict=True)], [0.0] * 4)
    found = of(diagnose_rerouting(model, sae, latent_set, EXAMPLES, **ARMS).blocked, role="reply").set_index("latent")
    assert found.loc[9, "plain"] == 0 and np.isnan(found.loc[9, "suppressed"]) and np.isnan(found.loc[9, "suppressed_one_sided"])
    wrong_way = found["plain"] <= 0
    assert found["suppressed"].isna()[wrong_way].all() and found["suppressed"].notna().any() and wrong_way.sum() > 1


@pytest.mark.parametrize("role", ROLES)
def test_the_shift_by_site_equals_a_numpy_restatement(model, role) -> None:
    found = of(shift_by_site(model, EXAMPLES, batch_size=5, **ARMS).frame, role=role)
    assert list(found["site"]) == POST and list(found["block"]) == [0, 1, 2, 3]
    for _, row in found.iterrows():
        base, *arms = of_arms(model, role, row["site"])
        plain, blocked = (average(minus(arm, base)) for arm in arms)
        lengths = np.linalg.norm(plain), np.linalg.norm(blocked)
        expected = {
            "base": average([np.linalg.norm(h, axis=-1) for h in base]),
            "plain": lengths[0],
            "blocked": lengths[1],
            "ratio": lengths[1] / lengths[0],
            "cosine": plain @ blocked / lengths[0] / lengths[1],
            "returned": plain @ blocked / lengths[0] ** 2,
        }
        np.testing.assert_allclose(row[list(expected)].astype(float), list(expected.values()), rtol=2e-3, atol=1e-4)
    assert found["ratio"].nunique() == 4


def shares(by_block, role="reply") -> pd.DataFrame:
    return pd.DataFrame({"role": role, "site": POST[b], "block": b, "returned": share} for b, share in by_block.items())


def test_sites_where_the_shift_is_there_again_are_those_above_the_blocked_sites_share() -> None:
    frame = pd.concat([shares({3: 0.9, 0: 0.75, 1: 0.5, 2: 0.58}), shares(dict.fromkeys(range(4), 1.0), role="prompt")])
    assert returning_sites(frame, POST[1]) == [POST[0], POST[3]]  # by depth, not in the frame's order
    assert returning_sites(frame, POST[1], margin=0) == [POST[0], POST[2], POST[3]]
    assert returning_sites(frame, POST[1], role="prompt") == [] and returning_sites(frame, POST[3]) == []
    second = pd.concat([frame, shares({3: 0.9, 0: 0.3, 1: 0.5, 2: 0.58})])  # another seed: block 0's mean is 0.525
    assert returning_sites(second, POST[1]) == [POST[3]]
    for change, message in (
        ({"blocked_site": "blocks.9.hook_resid_post"}, "expected one of .*blocks.0.hook_resid_post.*blocks.9"),
        ({"role": "replies"}, "expected one of .*'reply'.*'replies'"),
        ({"margin": -1.0}, "margin >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            returning_sites(**{"shifts": frame, "blocked_site": POST[1], **change})
    with pytest.raises(ValueError, match="plain did not move at .*blocks.2"):
        returning_sites(shares({1: 0.5, 2: float("nan")}), POST[1])


def test_links_lead_to_neuronpedia_where_the_sae_has_a_place_there(model, sae, latent_set) -> None:
    sae.cfg.metadata.neuronpedia_id = "llama3.1-8b/19-x"
    found = diagnose_rerouting(model, sae, latent_set, EXAMPLES[:3], top=2, **ARMS)
    assert found.blocked["link"][1] == "https://www.neuronpedia.org/llama3.1-8b/19-x/9"
    first = found.outside.iloc[0]
    assert first["link"].endswith(f"x/{first['latent']}") and len(found.outside) == 2 * 3


def test_the_model_is_left_as_it_was(model, sae, latent_set) -> None:
    tokens = torch.arange(7, 20)[None]
    model.use_adapter("one")
    before, trainable = model(tokens), [n for n, p in model.hf.named_parameters() if p.requires_grad]
    diagnose_rerouting(model, sae, latent_set, EXAMPLES[:3], **ARMS)
    assert model.active_adapter == "one" and torch.equal(model(tokens), before)
    assert trainable == [n for n, p in model.hf.named_parameters() if p.requires_grad]
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_figures_hold_a_line_for_every_role(model, sae, latent_set) -> None:
    frame = shift_by_site(model, EXAMPLES[:3], **ARMS).frame
    axes = plots.rerouting(frame).axes
    assert [len(panel.lines) for panel in axes] == [3 + 2] * 3 and len(plots.rerouting(of(frame, role="reply")).axes[0].lines) == 1 + 2
    line = axes[2].lines[2].get_ydata()
    np.testing.assert_allclose(line, of(frame, role="reply")["returned"])
    one, other = (of(frame, role="reply").assign(returned=share) for share in (0.2, 0.6))
    panel = plots.rerouting(pd.concat([one, other])).axes[2]
    np.testing.assert_allclose(panel.lines[0].get_ydata(), 0.4)  # the seeds' mean, and their range
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.2, 0.6))


def test_mistakes_are_refused(model, sae, latent_set) -> None:
    def ask(**options):
        good = {"sae": sae, "latent_set": latent_set, "rows": EXAMPLES, "plain": "one", "blocked": "two", "progress": False}
        return diagnose_rerouting(model, **{**good, **options})

    for options, message in (
        ({"blocked": "one"}, "expected two adapters"),
        ({"plain": "lost"}, "unknown adapter 'lost'"),
        ({"sae": sae_at(SITE, seed=3)}, "another SAE"),
        ({"rows": [*EXAMPLES, Prompt(id="0", text="w1")]}, "rows of one kind"),
        ({"top": 0}, "top >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ask(**options)
    for options, message in (
        ({"sites": ["blocks.1.hook_resid_pots"]}, "close matches"),
        ({"sites": []}, "at least one site"),
        ({"sites": ["blocks.1.attn.hook_pattern"]}, "expected sites of"),
        ({"blocked": "one"}, "expected two adapters"),
    ):
        with pytest.raises(ValueError, match=message):
            shift_by_site(model, EXAMPLES, **{**ARMS, **options})
    with model.using("base"):  # which adapters are compared does not depend on the one that acts
        ask()
