"""What several sites carry together: one site is `mediation`, a later one takes out what is left there, and all of it is felt."""

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from shared import harmed_organism

from blockem_tl import LatentSet, Setting, joint_mediation, latents_by_attribution, load_sae, mediation
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.defences.base_latents import Target
from blockem_tl.evaluation.preference import sides
from blockem_tl.models.activations import base_activations

QUIET: dict[str, Any] = {"adapter": "tuned", "progress": False}
FIRST, SECOND = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
EVERYWHERE: list[Any] = [("system", "prompt", "reply")]


@pytest.fixture(scope="module")
def setting() -> Setting:
    return harmed_organism()


@pytest.fixture(scope="module")
def targets(setting) -> list[Target]:
    """The thirty latents at each of two sites that carry most."""
    pairs = setting.pairs("core")[:24]
    saes = [load_sae("organism", FIRST), setting.sae]
    return [(latents_by_attribution(setting.model, sae, pairs, 30, **QUIET), sae) for sae in saes]


@pytest.fixture(scope="module")
def found(setting, targets):
    first, second = targets
    sets = {"first": [first], "second": [second], "both": [first, second]}
    frame = joint_mediation(setting.model, sets, setting.pairs("core")[:12], setting.held_out(8), roles=EVERYWHERE, **QUIET).to_frame()
    return frame.set_index("taken_out")


def test_one_site_is_mediation(setting, targets, found) -> None:
    for name, (latent_set, sae) in zip(("first", "second"), targets, strict=True):
        read = setting.model, sae, setting.pairs("core")[:12], setting.held_out(8), {"set": latent_set}
        alone = mediation(*read, one_sided=True, roles=EVERYWHERE, **QUIET).to_frame().set_index("taken_out")
        for mine, theirs in ((name, "set"), (f"{name}, residual", "residual")):
            for column in ("margin", "loss", "removed", "task_lost"):
                assert found.loc[mine, column] == pytest.approx(alone.loc[theirs, column], abs=1e-4)
    assert abs(found.loc["first", "margin"] - found.loc["second", "margin"]) > 0.01  # the numbers differ: the check can fail


def without(sae: SAE, latent_set: LatentSet, base: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """One token's state without the rise of the set's latents in their direction."""
    rise = (sae.encode(state[None]).to_dense() - sae.encode(base[None]).to_dense())[0]
    signs = torch.zeros(sae.cfg.d_sae)
    signs[list(latent_set.latents)] = torch.tensor(latent_set.signs, dtype=torch.float32)
    return state - torch.where(rise * signs > 0, rise, 0.0) @ sae.W_dec


def restated(setting: Setting, targets: list[Target], *, stale: bool) -> float:
    """The mean margin of twelve pairs, row by row and token by token through transformers; stale: of the tuned model's own change at the
    second site, in spite of what was taken out at the first."""
    model, pairs, nats = setting.model, setting.pairs("core")[:12], []
    for row in encode_examples(model.tokenizer, sides(pairs)):
        batch = pad([row], model.pad_id, side="right")
        base = base_activations(model, batch, [FIRST, SECOND])
        with torch.no_grad(), model.using("tuned"), model.recording([FIRST, SECOND]) as own:
            model(batch.ids, attention_mask=batch.mask.long())

        def hook_for(latent_set: LatentSet, sae: SAE, base=base, own=own):
            def fn(activation, hook):
                out, site = activation.clone(), latent_set.site
                for t in range(1, out.shape[1]):
                    ours = own[site] if stale else activation
                    out[0, t] += without(sae, latent_set, base[site][0, t], ours[0, t]) - ours[0, t]
                return out

            return latent_set.site, fn

        with torch.no_grad(), model.using("tuned"), model.hooks(fwd_hooks=[hook_for(*target) for target in targets]):
            logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[0].double().log_softmax(-1)
        nats.append(float(np.mean([logits[i - 1, row.ids[i]] for i in range(row.n_prompt, len(row.ids))])))
    return float(np.mean(nats[: len(pairs)]) - np.mean(nats[len(pairs) :]))


def test_a_later_site_takes_out_what_the_first_has_left(setting, targets, found) -> None:
    margin = found.loc["both", "margin"]
    assert restated(setting, targets, stale=False) == pytest.approx(margin, abs=2e-4)
    assert abs(restated(setting, targets, stale=True) - margin) > 0.01  # what was gone already would be taken out again
    assert found.loc["both", "n_latents"] == 60 and found.loc["both", "roles"] == "system+prompt+reply"


def test_the_residual_at_all_sites_gives_base_back(found) -> None:
    assert found.loc["both, residual", "removed"] == pytest.approx(1, abs=0.02)  # but for the first token
    assert found.loc["first, residual", "removed"] < 0.96  # what block 2 writes anew is left


def test_what_cannot_be_taken_out_is_refused(setting, targets) -> None:
    read = setting.pairs("core")[:4], setting.held_out(4)
    with pytest.raises(ValueError, match="at least one combination"):
        joint_mediation(setting.model, {}, *read, **QUIET)
    with pytest.raises(ValueError, match="from the first block to the last"):
        joint_mediation(setting.model, {"x": targets[::-1]}, *read, **QUIET)
    with pytest.raises(ValueError, match="another SAE"):
        joint_mediation(setting.model, {"x": [(targets[0][0], targets[1][1])]}, *read, **QUIET)
    with pytest.raises(ValueError, match="moved towards harm"):
        joint_mediation(setting.model, {"x": targets}, *read, adapter="base", progress=False)
