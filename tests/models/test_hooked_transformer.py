"""TransformerLens's own classes: reading, diffing, encoding and patching by hook pairs give there what they give on `Model`."""

import pytest
import torch
from sae_lens import HookedSAETransformer, StandardSAE, StandardSAEConfig
from shared import perturb
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights, convert_llama_weights
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from blockem_tl import Condition, Prompt, Steering, attached, encode_latents, load_model, median_norm, patch, read_sites, record, steer
from blockem_tl.discovery.diffing import shifts

SITE = "blocks.1.hook_resid_post"
PROMPTS = [Prompt(id=str(n), text=" ".join(f"w{(7 * n + i) % 57}" for i in range(n))) for n in (1, 6, 3)]
SHAPE = {"n_layers": 3, "d_model": 32, "n_ctx": 96, "d_head": 8, "n_heads": 4, "d_vocab": 64, "device": "cpu", "init_weights": False}


def gpt2(seed: int):
    torch.manual_seed(seed)
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=96, initializer_range=0.2)).eval()
    cfg = HookedTransformerConfig(
        **SHAPE, d_mlp=128, act_fn="gelu_new", normalization_type="LN", eps=1e-5, original_architecture="GPT2LMHeadModel"
    )
    return hf, cfg, convert_gpt2_weights


def llama(seed: int):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=96, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    cfg = HookedTransformerConfig(
        **SHAPE, d_mlp=64, act_fn="silu", normalization_type="RMS", eps=1e-6, gated_mlp=True, final_rms=True,
        positional_embedding_type="rotary", rotary_dim=8, rotary_adjacent_pairs=False, n_key_value_heads=2,
        original_architecture="LlamaForCausalLM",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), cfg, convert_llama_weights


@pytest.fixture(params=[gpt2, llama], ids=["gpt2", "llama"])
def pairs(request, tokenizer_folder):
    """(Model, HookedSAETransformer) of the same weights, twice: base and a tuned model."""
    found = []
    for seed in (0, 1):
        hf, cfg, convert = request.param(seed)
        hf.set_attn_implementation("eager")
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        hooked = HookedSAETransformer(cfg, tokenizer=tokenizer, default_padding_side="right")
        hooked.load_state_dict(convert(hf, cfg), strict=False)
        found.append((load_model(hf, tokenizer=AutoTokenizer.from_pretrained(tokenizer_folder)), hooked))
    return found


@pytest.fixture
def sae():
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=40))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = SITE
    return sae


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_readings_and_scales_are_the_same(pairs) -> None:
    for model, hooked in pairs:
        ((ours, batch),) = read_sites(model, [SITE, "blocks.0.hook_attn_out"], PROMPTS)
        ((theirs, other),) = read_sites(hooked, [SITE, "blocks.0.hook_attn_out"], PROMPTS)
        assert torch.equal(batch.ids, other.ids) and isinstance(hooked, HookedTransformer)
        for site in ours:
            close(ours[site][batch.mask], theirs[site][batch.mask])
        assert median_norm(hooked, SITE, PROMPTS) == pytest.approx(median_norm(model, SITE, PROMPTS), rel=1e-4)
    assert median_norm(pairs[0][0], SITE, PROMPTS) != pytest.approx(median_norm(pairs[1][0], SITE, PROMPTS), rel=1e-3)
    with pytest.raises(ValueError, match="HookedSAETransformer cannot hold adapters: load the model with load_model"):
        median_norm(pairs[0][1], SITE, PROMPTS, adapter="tuned")


def test_diffing_two_models_is_the_same(pairs, sae) -> None:
    (base, hooked_base), (tuned, hooked_tuned) = pairs
    expected = shifts(tuned, sae, PROMPTS, base=base)
    close(shifts(hooked_tuned, sae, PROMPTS, base=hooked_base), expected)
    assert expected.abs().max() > 0.01 and shifts(hooked_tuned, sae, PROMPTS, base=hooked_tuned).abs().max() == 0
    for model in (hooked_tuned, tuned):
        with pytest.raises(ValueError, match=f"got {type(model).__name__} without one.*base=..."):
            shifts(model, sae, PROMPTS)
    tuned.add_adapter("more", target_modules=("mlp.c_proj",) if hasattr(tuned.original_model, "transformer") else ("up_proj",))
    perturb(tuned, "more")
    assert not torch.equal(shifts(tuned, sae, PROMPTS), expected)


def test_steering_and_patching_by_hook_pairs_are_the_same(pairs) -> None:
    (base, hooked_base), (tuned, hooked_tuned) = pairs
    ids = torch.randint(7, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    direction = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(1)), dim=0)
    condition = Condition(name="up", steering=(Steering(site=SITE, direction=direction, dose=1.5, scale=3.0),))
    plain, logits = hooked_tuned(ids), tuned.run_with_hooks(ids, fwd_hooks=[steer(SITE, direction, 1.5, scale=3.0)])
    with condition.apply(hooked_tuned):
        close(hooked_tuned(ids), logits)
    with condition.apply(tuned):
        close(tuned(ids), logits)
    assert (plain - logits).abs().max() > 0.01 and torch.equal(hooked_tuned(ids), plain)
    states: dict[str, dict[str, torch.Tensor]] = {"ours": {}, "theirs": {}}
    for model, store in ((base, states["ours"]), (hooked_base, states["theirs"])):
        with attached(model, [record(SITE, store)]):
            model(ids)
    close(states["theirs"][SITE], states["ours"][SITE])
    patched = tuned.run_with_hooks(ids, fwd_hooks=[patch(SITE, states["ours"][SITE])])
    close(hooked_tuned.run_with_hooks(ids, fwd_hooks=[patch(SITE, states["theirs"][SITE])]), patched)
    assert (patched - plain).abs().max() > 0.01


def test_an_attached_saes_latents_are_those_of_encode_latents(pairs, sae) -> None:
    ids = torch.randint(7, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    for model in pairs[0]:
        plain: dict[str, torch.Tensor] = {}
        with attached(model, [record(SITE, plain)]):
            model(ids)
        with model.saes([sae]):
            name = next(key for key in model.hook_dict if key.endswith("hook_sae_acts_post"))
            latents: dict[str, torch.Tensor] = {}
            with attached(model, [record(name, latents)]):
                model(ids)
        close(encode_latents(sae, plain[SITE], [3, 0, 17]), latents[name][..., [3, 0, 17]])
        assert (latents[name] > 0).any() and not torch.equal(latents[name][..., [3, 0]], latents[name][..., [0, 3]])
