"""attention="sdpa" is the same model: logits, gradients and replies agree with eager, and every hook still fires."""

from types import SimpleNamespace

import pytest
import torch
from shared import EXAMPLES, SITES, perturb, sae_at, set_of
from torch import Tensor

from blockem_tl import Blocking, Prompt, TrainingConfig, finetune, generate, load_model
from blockem_tl.models._fused_attention import FusedAttention, fuse

PROMPTS = [Prompt(id=str(i), text=" ".join(f"w{(5 * i + j) % 50}" for j in range(2 + 4 * i))) for i in range(5)]
INSIDE = ("hook_attn_scores", "hook_pattern", "hook_rot_q", "hook_rot_k")


@pytest.fixture
def both(tiny_folder):
    """The model eager and fused, with the same adapter."""
    models = {kind: load_model(tiny_folder, attention=kind) for kind in ("eager", "sdpa")}
    for model in models.values():
        model.add_adapter("tuned", rank=4, seed=1)
        perturb(model, "tuned")
    return SimpleNamespace(**models)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """The way that each attention went."""
    found, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: [found.append("fused"), kernel(*a, **k)][1])
    return found


def logits_of(model, **options) -> Tensor:
    ids = torch.arange(60).view(3, 20) % 50 + 3
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0  # padded right, as in training
    mask[2, :7] = 0  # and left, as in generation
    return model.hf(input_ids=ids, attention_mask=mask, **options).logits[mask.bool()]


@pytest.mark.parametrize("adapter", ["base", "tuned"])
def test_logits_agree(both, ran, adapter) -> None:
    with both.eager.using(adapter), both.sdpa.using(adapter), torch.no_grad():
        eager, fused = logits_of(both.eager), logits_of(both.sdpa)
    assert ran == ["fused"] * both.sdpa.cfg.n_layers and both.sdpa.attention == "sdpa" and both.eager.attention == "eager"
    torch.testing.assert_close(eager, fused, rtol=1e-3, atol=1e-4)
    with both.eager.using("base"), both.sdpa.using("tuned"), torch.no_grad():
        assert not torch.allclose(logits_of(both.eager), logits_of(both.sdpa), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("inside", INSIDE)
def test_a_hook_inside_fires_and_acts(both, ran, inside) -> None:
    """In its block attention goes the eager way, the others stay fused."""
    hook = (f"blocks.1.attn.{inside}", lambda value, hook: value * 0.5)
    found = []
    for model in (both.eager, both.sdpa):
        with model.using("tuned"), model.hooks(fwd_hooks=[hook]), torch.no_grad():
            found.append(logits_of(model))
    assert ran == ["fused"] * (both.sdpa.cfg.n_layers - 1)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
    with both.sdpa.using("tuned"), torch.no_grad():
        assert not torch.allclose(logits_of(both.sdpa), found[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("site", ["blocks.1.attn.hook_q", "blocks.1.attn.hook_v", "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"])
def test_hooks_around_fire_and_act_while_it_is_fused(both, ran, site) -> None:
    found = []
    for model in (both.eager, both.sdpa):
        with model.hooks(fwd_hooks=[(site, lambda value, hook: value * 0.5)]), torch.no_grad():
            found.append(logits_of(model))
    assert ran == ["fused"] * both.sdpa.cfg.n_layers
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_everything_is_cached(both) -> None:
    ids = torch.arange(12)[None] + 3
    caches = [model.run_with_cache(ids)[1] for model in (both.eager, both.sdpa)]
    assert set(caches[0].keys()) == set(caches[1].keys())
    for name in caches[0]:
        torch.testing.assert_close(caches[0][name], caches[1][name], rtol=1e-3, atol=1e-4)


def test_replies_are_the_same(both) -> None:
    for adapter in ("base", "tuned"):
        eager, fused = (generate(m, PROMPTS, adapter=adapter, max_new_tokens=20, progress=False) for m in (both.eager, both.sdpa))
        assert [reply.reply_ids for reply in eager] == [reply.reply_ids for reply in fused]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocked_training_is_the_same(both, checkpointing) -> None:
    sae, runs = sae_at(SITES[0]), []
    for model in (both.eager, both.sdpa):
        block = Blocking(latent_set=set_of(sae), sae=sae, weight=3.0)
        config = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-3, epochs=2, gradient_checkpointing=checkpointing)
        runs.append(finetune(model, EXAMPLES, config=config, defences=[block], adapter="run", progress=False).history)
    for eager, fused in zip(*runs, strict=True):
        assert fused == pytest.approx(eager, rel=1e-3, abs=1e-6)


def test_what_cannot_be_fused_is_refused(tiny_folder, both) -> None:
    with pytest.raises((ValueError, TypeError), match="flash"):  # the types' check, where it is switched on, comes first
        load_model(tiny_folder, attention="flash")
    both.eager.blocks[0].attn.original_component.attn_logit_softcapping = 50.0
    with pytest.raises(ValueError, match='attn_logit_softcapping: load it with attention="eager"'):
        fuse(both.eager)
    assert not any(isinstance(part, FusedAttention) for part in both.eager.modules())
