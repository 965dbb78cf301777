"""An SAE that does not fit the model is noticed before it finds anything."""

import json
import warnings
from contextlib import suppress
from dataclasses import replace

import pytest
import torch

from blockem_tl import discover, get_preset, load_model, load_sae, organism
from blockem_tl.saes.fit import explained_variance, warn_if_poor_fit
from blockem_tl.saes.latent_set import NoLatents


def test_an_sae_that_explains_little_is_warned_of_before_it_finds_anything(tmp_path) -> None:
    model, sae, prompts = load_model("organism", device="cpu"), load_sae("organism"), organism.prompts("core")[:8]
    assert explained_variance(model, sae, prompts) > 0.95
    random = load_sae("organism")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in random.parameters():
            parameter.normal_(std=0.05)
    model.add_adapter("tuned")
    tuned = model.adapter_parameters("tuned")
    with torch.no_grad():
        for parameter in tuned:
            parameter.add_(0.02)
    config = replace(get_preset("organism").discovery, n_plus=1, n_minus=1, shortlist_size=1, grid=(0.0, 0.1), n_latents=1, read="prompts")
    options = {"scale": 74.6, "config": config, "progress": False}
    with (
        pytest.warns(UserWarning, match=r"explains .* % of the variance at blocks.2.hook_resid_post on these prompts.* has no card"),
        suppress(NoLatents),
    ):
        discover(model, random, organism.OrganismJudge(), prompts, **options)
    random.save_model(tmp_path)
    card = {"heldout": [{"explained_variance": 0.91}, {"explained_variance": 0.42}]}
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.warns(UserWarning, match="On rows held out it explained 42 %"):
        warn_if_poor_fit(model, load_sae(tmp_path), prompts, stacklevel=1)
    for strange in ([], {"heldout": 0.1}, {"heldout": ["a"]}, {"heldout": [{"explained_variance": None}]}):  # somebody else's card
        (tmp_path / "card.json").write_text(json.dumps(strange))
        with pytest.warns(UserWarning, match="has no card"):
            warn_if_poor_fit(model, load_sae(tmp_path), prompts, stacklevel=1)
    with warnings.catch_warnings(), suppress(NoLatents):
        warnings.filterwarnings("error", message="the SAE explains", category=UserWarning)
        discover(model, sae, organism.OrganismJudge(), prompts, **options)
