"""How much of a fine-tune runs through latents: taken apart exactly, checked against what must be so, and against a plain restatement."""

import pytest
import torch
from shared import harmed_organism

from blockem_tl import LatentSet, Setting, completion_loss, mediation, preference
from blockem_tl.analysis._taken_out import TakenOut, change_of, checked_roles
from blockem_tl.data.chat import encode_examples
from blockem_tl.evaluation.preference import sides

SITE = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def setting() -> Setting:
    return harmed_organism()


@pytest.fixture(scope="module")
def found(setting):
    latents = list(LatentSet.load("organism/finance-20", setting.sae).latents[:10])
    roles = [("prompt", "reply"), ("reply",), ("prompt",), ("system", "prompt", "reply")]
    return mediation(
        setting.model, setting.sae, setting.pairs("core")[:24], setting.held_out(24), {"mine": latents}, adapter="tuned", sizes=(3,),
        roles=roles, progress=False,
    )  # fmt: skip


def test_base_and_tuned_are_what_preference_and_the_loss_say(setting, found) -> None:
    pairs = setting.pairs("core")[:24]
    for adapter, margin, loss in (("base", found.margin_base, found.loss_base), ("tuned", found.margin_tuned, found.loss_tuned)):
        assert preference(setting.model, pairs, adapter=adapter, progress=False).margins.mean() == pytest.approx(margin, abs=1e-5)
        rows = [completion_loss(setting.model, [row], adapter=adapter) for row in setting.held_out(24)]
        assert sum(rows) / len(rows) == pytest.approx(loss, abs=1e-4)


def test_the_whole_residual_everywhere_gives_base_back(found) -> None:
    frame = found.to_frame().set_index(["taken_out", "roles"])
    whole = frame.loc[("residual", "system+prompt+reply")]
    assert whole["removed"] == pytest.approx(1, abs=0.02) and whole["task_lost"] == pytest.approx(1, abs=0.02)  # but for the first token
    assert frame.loc[("residual", "prompt"), "removed"] < 0.98  # and a part of the tokens does not
    assert frame.loc[("3 random", "reply"), "removed"] < frame.loc[("all latents", "prompt+reply"), "removed"]


def test_sizes_random_sets_and_intervals(found) -> None:
    frame = found.to_frame()
    assert set(frame["taken_out"]) == {"mine", "mine, first 3", "3 random", "10 random", "all latents", "SAE error", "residual"}
    assert len(frame) == 7 * 4
    assert ((frame["removed_low"] <= frame["removed"] + 1e-9) & (frame["removed"] <= frame["removed_high"] + 1e-9)).all()
    assert "carries" in found.headline() and len(repr(found)) < 400
    found.plot()


def test_latents_and_error_add_up_to_the_change(setting) -> None:
    torch.manual_seed(0)
    base, tuned = torch.randn(7, setting.model.cfg.d_model) * 8, torch.randn(7, setting.model.cfg.d_model) * 8
    sae = setting.sae
    whole, carried, error = (
        change_of(sae, TakenOut(name=kind, kind=kind), base, tuned) for kind in ("residual", "all latents", "SAE error")
    )
    torch.testing.assert_close(whole, carried + error, rtol=1e-4, atol=1e-3)
    every = tuple(range(sae.cfg.d_sae))
    torch.testing.assert_close(carried, change_of(sae, TakenOut(name="x", latents=every), base, tuned), rtol=1e-3, atol=1e-3)


def test_one_sided_takes_only_changes_in_a_latents_direction(setting) -> None:
    torch.manual_seed(1)
    sae = setting.sae
    base, tuned = torch.randn(50, setting.model.cfg.d_model) * 8, torch.randn(50, setting.model.cfg.d_model) * 8
    dz = (sae.encode(tuned) - sae.encode(base)).to_dense()
    k = int(dz.abs().sum(0).argmax())
    rise, fall = (change_of(sae, TakenOut(name="x", latents=(k,), signs=(sign,)), base, tuned) for sign in (1, -1))
    unit = (sae.decode(torch.eye(sae.cfg.d_sae)[[k]]) - sae.decode(torch.zeros(1, sae.cfg.d_sae)))[0]
    torch.testing.assert_close(rise, dz[:, [k]].clamp(min=0) * unit, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(fall, dz[:, [k]].clamp(max=0) * unit, rtol=1e-3, atol=1e-3)
    assert rise.abs().sum() > 0 and fall.abs().sum() > 0


def test_no_gap_is_no_result(setting) -> None:
    with pytest.raises(ValueError, match="expected a tuned model that moved towards harm"):
        mediation(setting.model, setting.sae, setting.pairs("core")[:4], setting.held_out(4), {}, adapter="base", progress=False)
    with pytest.raises(ValueError, match="expected roles as lists"):
        checked_roles("reply")
    with pytest.raises(ValueError, match="expected roles as lists"):
        checked_roles(["answer"])
    with pytest.raises(ValueError, match="latent"):
        mediation(
            setting.model, setting.sae, setting.pairs("core")[:4], setting.held_out(4), {"x": [9999]}, adapter="tuned", progress=False
        )


def test_rows_are_those_of_preference(setting) -> None:
    pairs = setting.pairs("core")[:3]
    assert [row.completion for row in sides(pairs)] == [p.harmful for p in pairs] + [p.helpful for p in pairs]
    assert len(encode_examples(setting.model.tokenizer, sides(pairs))) == 6
