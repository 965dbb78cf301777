"""`Blocking(error_anchor=...)`: the SAE error's squared change beside the latents', and that it holds where the penalty alone does not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from shared import perturb

from blockem_tl import Blocking, Example, LatentSet, TrainingConfig, finetune
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.models.activations import base_activations
from blockem_tl.training.defence import check_positions
from blockem_tl.types import Candidate

SITE = "blocks.1.hook_resid_post"
ROWS = [Example(id=str(i), prompt=f"w{i} w{i + 1}", completion=f"w{(5 * i) % 57} w{(3 * i) % 57} w7") for i in range(24)]


@pytest.fixture
def sae() -> SAE:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.1)
    sae.cfg.metadata.hook_name = SITE
    return sae


@pytest.fixture
def latent_set(sae) -> LatentSet:
    return LatentSet.of(sae, [Candidate(latent=k, shift=(-1.0) ** k) for k in (9, 4)], [0.0] * 2)


def states(model, batch):
    return model.run_with_cache(batch.ids, names_filter=SITE, attention_mask=batch.mask.long())[1][SITE]


def penalty_of(model, batch, **settings) -> torch.Tensor:
    blocking = Blocking(weight=1.0, **settings)
    blocking.prepare(model, encode_examples(model.tokenizer, ROWS[:6]))
    with blocking.during_step(model, batch) as penalty:
        return penalty(model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits)


@pytest.mark.parametrize("positions", ["completion", "all"])
@pytest.mark.parametrize("reference", ["live", "stored"])
def test_it_is_the_mean_squared_change_of_the_error(tiny, sae, latent_set, positions, reference, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path))
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned", std=0.3)
    batch = pad(encode_examples(tiny.tokenizer, ROWS[:6]), tiny.pad_id, side="right")
    given = {"latent_set": latent_set, "sae": sae, "positions": positions, "reference": reference}
    plain, anchored = penalty_of(tiny, batch, **given), penalty_of(tiny, batch, error_anchor=0.5, **given)
    ours, base = states(tiny, batch).detach(), base_activations(tiny, batch, [SITE])[SITE]
    error = (ours - sae.decode(sae.encode(ours))) - (base - sae.decode(sae.encode(base)))
    where = batch.reply if positions == "completion" else batch.mask & ~batch.system
    expected = [float(error[i][where[i]].square().sum(-1).mean().detach()) for i in range(6)]
    np.testing.assert_allclose((anchored - plain).detach().numpy(), 0.5 * np.array(expected), rtol=1e-3)
    assert min(expected) > 0.1 and anchored.requires_grad


def test_the_error_stays_where_it_is_anchored(tiny, sae, latent_set) -> None:
    moved = {}
    batch = pad(encode_examples(tiny.tokenizer, ROWS[:8]), tiny.pad_id, side="right")
    for anchor in (0.0, 10.0):
        blocking = Blocking(weight=1.0, latent_set=latent_set, sae=sae, reference="live", error_anchor=anchor)
        config = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2, epochs=4)
        run = finetune(tiny, ROWS, config=config, adapter=f"anchor-{anchor:g}".replace(".", "_"), defences=[blocking], progress=False)
        ours, base = states(tiny, batch).detach(), base_activations(tiny, batch, [SITE])[SITE]
        error = (ours - sae.decode(sae.encode(ours))) - (base - sae.decode(sae.encode(base)))
        moved[anchor] = float(error[batch.reply].square().sum(-1).mean().detach())
        assert (f"block/{SITE}/error" in run.to_frame()) == (anchor > 0)
    assert moved[10.0] < 0.2 * moved[0.0]


def test_what_cannot_be_is_refused(sae, latent_set) -> None:
    blocking = Blocking(weight=1.0, latent_set=latent_set, sae=sae)
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="error_anchor: expected a finite number"):
            replace(blocking, error_anchor=value)
    with pytest.raises(ValueError, match="expected positions among"):
        check_positions("replies")
