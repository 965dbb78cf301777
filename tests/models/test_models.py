"""The model: equal to plain transformers, live adapters in plain peft format, and hook names that work in every state."""

import json

import pytest
import torch
from peft import PeftModel
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from safetensors.torch import load_file
from shared import perturb
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from blockem_tl import HookNotFired, load_model, record, steer

SPELLINGS = ("blocks.1.hook_resid_post", "blocks.1.hook_out")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def sae() -> StandardSAE:
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    sae.cfg.metadata.hook_name = SPELLINGS[0]
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.2)
    return sae


# ---------------------------------------------------------------------------------------------- equality with plain transformers


def test_base_equals_plain_transformers_bit_for_bit_and_tuned_does_not(tiny, plain, tokens) -> None:
    expected = plain(tokens).logits
    assert torch.equal(tiny(tokens), expected)
    tiny.add_adapter("tuned")
    assert torch.equal(tiny(tokens), expected)  # B = 0
    perturb(tiny, "tuned")
    assert not torch.allclose(tiny(tokens), expected)
    with tiny.using("base"):
        with tiny.using("base"):
            assert torch.equal(tiny(tokens), expected)
        assert torch.equal(tiny(tokens), expected)  # leaving an inner block must not switch the adapter on
    assert not torch.allclose(tiny(tokens), expected)


def test_base_ends_after_an_exception(tiny, tokens) -> None:
    tiny.add_adapter()
    perturb(tiny, "default")
    tuned = tiny(tokens)
    with pytest.raises(KeyError), tiny.using("base"):
        raise KeyError
    assert torch.equal(tiny(tokens), tuned)


def test_loads_an_already_loaded_model_and_an_embedded_one(plain, tiny_folder, tokens) -> None:
    expected = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")(tokens).logits
    assert torch.equal(load_model(plain)(tokens), expected)
    with pytest.raises(ValueError, match="already loaded keeps its dtype"):
        load_model(plain, dtype=torch.bfloat16)
    assert load_model("organism", device="cpu").cfg.n_layers > 2


def test_what_cannot_be_loaded_says_what_was_expected(tmp_path, plain) -> None:
    with pytest.raises(ValueError, match="expected an embedded name, a folder"):
        load_model(tmp_path / "nothing")
    plain.config._name_or_path = ""
    with pytest.raises(ValueError, match="expected tokenizer="):
        load_model(plain)


# ---------------------------------------------------------------------------------------------- adapters


def test_only_the_adapter_is_trainable(tiny) -> None:
    assert not [name for name, p in tiny.named_parameters() if p.requires_grad]
    tiny.add_adapter("one", rank=4)
    trainable = [name for name, p in tiny.hf.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(EVERY) * 4 and all(".one." in name and "lora_" in name for name in trainable)


def test_up_to_block_freezes_what_lies_downstream(tiny, tokens) -> None:
    tiny.add_adapter("one", up_to_block=1)
    perturb(tiny, "one")
    blocks = {int(name.split("layers.")[1].split(".")[0]) for name, p in tiny.hf.named_parameters() if p.requires_grad}
    assert blocks == {0, 1}
    with pytest.raises(ValueError, match=r"expected 0\.\.3, got 4"):
        tiny.add_adapter("two", up_to_block=4)


@pytest.mark.parametrize("options", [{}, {"up_to_block": 1}, {"target_modules": ("q_proj", "down_proj"), "rank": 3, "alpha": 7}])
def test_saved_adapters_load_in_plain_peft_and_back_with_equal_logits(tiny, tiny_folder, tokens, tmp_path, options) -> None:
    tiny.add_adapter("tuned", **options)
    perturb(tiny, "tuned")
    expected = tiny(tokens)
    folder = tiny.save_adapter(tmp_path / "adapter")
    assert not [key for key in load_file(folder / "adapter_model.safetensors") if "_original_component" in key]
    assert "_original_component" not in json.dumps(json.loads((folder / "adapter_config.json").read_text()))
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")
    assert torch.equal(PeftModel.from_pretrained(base, folder)(input_ids=tokens).logits, expected)
    again = load_model(tiny_folder, adapter=folder, device="cpu")
    assert torch.equal(again(tokens), expected)
    with again.using("base"):
        assert not torch.allclose(again(tokens), expected)


def test_several_adapters_live_side_by_side(tiny, tokens) -> None:
    logits = {}
    for seed, name in enumerate(("one", "two")):
        tiny.add_adapter(name)
        perturb(tiny, name, seed=seed)
        logits[name] = tiny(tokens)
    assert tiny.adapters == ["one", "two"] and tiny.active_adapter == "two"
    assert not torch.allclose(logits["one"], logits["two"])
    tiny.use_adapter("one")
    assert torch.equal(tiny(tokens), logits["one"])
    tiny.remove_adapter("one")
    assert torch.equal(tiny(tokens), logits["two"])
    with tiny.using("base"):
        assert tiny.active_adapter is None


def test_removing_the_last_adapter_leaves_the_plain_model_with_its_hooks(tiny, plain, tokens) -> None:
    tiny.add_adapter("one")
    perturb(tiny, "one")
    tiny.remove_adapter("one")
    assert tiny.adapters == [] and torch.equal(tiny(tokens), plain(tokens).logits)
    store = {}
    tiny.run_with_hooks(tokens, fwd_hooks=[record(SPELLINGS[0], store)])
    tiny.add_adapter("one")  # and the name is free again


def test_adapter_mistakes_are_refused(tiny, tmp_path) -> None:
    tiny.add_adapter("one")
    with pytest.raises(ValueError, match="already held: pass overwrite=True"):
        tiny.add_adapter("one")
    with pytest.raises(ValueError, match="match no module.*q_proj"):
        tiny.add_adapter("two", target_modules=("c_attn",))
    with pytest.raises(ValueError, match="no adapter 'two'"):
        tiny.use_adapter("two")
    with pytest.raises(ValueError, match="expected an adapter folder"):
        tiny.load_adapter(tmp_path)
    folder = tiny.save_adapter(tmp_path / "adapter", "one")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        tiny.save_adapter(folder, "one")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(ValueError, match="does not fit.*left over"):
        tiny.load_adapter(folder, "three")
    for name in ("base", "a.b", "lora_"):
        with pytest.raises(ValueError, match="expected a name other than 'base'"):
            tiny.add_adapter(name)
    with tiny.using("base"), pytest.raises(ValueError, match=r"outside of model.using"):
        tiny.add_adapter("four")
    assert tiny.adapters == ["one"] == [tiny.active_adapter]


def test_a_replaced_adapter_comes_back_where_its_successor_fails(tiny, tokens, tmp_path) -> None:
    tiny.add_adapter("one")
    perturb(tiny, "one")
    tiny.add_adapter("two", rank=4)
    logits = {name: tiny(tokens) for name in ("one", "two") for _ in [tiny.use_adapter(name)]}
    tiny.use_adapter("one")
    trainable = {name: p.requires_grad for name, p in tiny.hf.named_parameters()}
    with pytest.raises(ValueError, match="match no module"):
        tiny.add_adapter("one", target_modules=("c_attn",), overwrite=True)
    with pytest.raises(ValueError, match="expected an adapter folder"):
        tiny.load_adapter(tmp_path, "one", overwrite=True)
    assert tiny.adapters == ["one", "two"] and tiny.active_adapter == "one" and torch.equal(tiny(tokens), logits["one"])
    assert {name: p.requires_grad for name, p in tiny.hf.named_parameters()} == trainable
    tiny.add_adapter("one", overwrite=True)  # and differs when it does not fail: B = 0 is base
    with tiny.using("base"):
        base = tiny(tokens)
    assert torch.equal(tiny(tokens), base) and not torch.equal(base, logits["one"])


def test_using_nests_and_leaves_what_acts_and_what_trains(tiny, tokens, tmp_path) -> None:
    base = tiny(tokens)
    for seed, name in enumerate(("one", "two")):
        tiny.add_adapter(name)
        perturb(tiny, name, seed=seed)
    saved = tiny.save_adapter(tmp_path / "saved", "one")
    logits = {name: tiny(tokens) for name in ("one", "two") for _ in [tiny.use_adapter(name)]}
    tiny.remove_adapter("one")
    trainable = [p.requires_grad for p in tiny.hf.parameters()]
    with tiny.using("base"):
        assert tiny.active_adapter is None and torch.equal(tiny(tokens), base)
        with tiny.using(saved):
            assert torch.equal(tiny(tokens), logits["one"])
            with tiny.using("two"), tiny.using(None):
                assert tiny.active_adapter == "two" and torch.equal(tiny(tokens), logits["two"])
            with pytest.raises(KeyError), tiny.using("base"):
                raise KeyError
            assert torch.equal(tiny(tokens), logits["one"])
        assert torch.equal(tiny(tokens), base)
    assert tiny.adapters == ["two"] and tiny.active_adapter == "two" and torch.equal(tiny(tokens), logits["two"])
    assert [p.requires_grad for p in tiny.hf.parameters()] == trainable
    for unknown in ("three", tmp_path):
        with pytest.raises(ValueError, match="unknown adapter.*expected 'base'.*folder of one"), tiny.using(unknown):
            pass


def test_saving_over_something_else_is_refused(tiny, tmp_path) -> None:
    tiny.add_adapter("one")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="besides an adapter, which would be lost"):
        tiny.save_adapter(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").exists()
    folder = tiny.save_adapter(tmp_path / "adapter")
    assert tiny.save_adapter(folder, overwrite=True) == folder


def test_adapters_may_be_called_after_seeds_or_modules(tiny, tokens) -> None:
    for name in ("1", "0", "mlp"):
        tiny.add_adapter(name)
    assert {len(tiny.adapter_parameters(name)) for name in ("1", "0", "mlp")} == {2 * len(EVERY) * 4}


ARCHITECTURES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2), EVERY),
    "gemma": (GemmaForCausalLM, GemmaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8), EVERY),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), ("mlp.c_proj", "mlp.c_fc")),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_round_trip_on_other_architectures(name, tiny_folder, tokens, tmp_path) -> None:
    kind, config, targets = ARCHITECTURES[name]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    hf = kind(config).eval()
    hf.save_pretrained(tmp_path / "base")
    model = load_model(hf, tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    base = model(tokens)
    model.add_adapter("tuned", target_modules=targets)
    perturb(model, "tuned")
    tuned = model(tokens)
    assert not torch.allclose(base, tuned)
    folder = model.save_adapter(tmp_path / "adapter")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    torch.testing.assert_close(PeftModel.from_pretrained(reloaded, folder)(input_ids=tokens).logits, tuned, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ["c_attn", "c_proj"])
def test_modules_that_the_bridge_renames_are_refused(tiny_folder, target) -> None:
    """The bridge splits GPT-2's c_attn and renames attn.c_proj: an adapter there could not be loaded by any other tool."""
    kind, config, _ = ARCHITECTURES["gpt2"]
    model = load_model(kind(config).eval(), tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    with pytest.raises(ValueError, match="bridge renames"):
        model.add_adapter("tuned", target_modules=(target,))
    assert model.adapters == []


# ---------------------------------------------------------------------------------------------- names and firing, in every state


def raw(model, sae):
    """As loaded."""


def attached_sae(model, sae):
    """With an SAE at the site."""
    model.add_sae(sae)


def reset(model, sae):
    """After an SAE came and went."""
    model.add_sae(sae)
    model.reset_saes()


def compatibility(model, sae):
    """With TransformerLens's weight processing."""
    model.enable_compatibility_mode()


@pytest.mark.parametrize("state", [raw, attached_sae, reset, compatibility])
@pytest.mark.parametrize("site", SPELLINGS)
def test_both_spellings_work_in_every_call_and_state(tiny, sae, tokens, state, site) -> None:
    state(tiny, sae)
    plain, store, hook = tiny(tokens), {}, steer(site, torch.ones(32))
    tiny.run_with_hooks(tokens, fwd_hooks=[record(site, store)])
    _, cache = tiny.run_with_cache(tokens, names_filter=site)
    assert torch.equal(cache[site], store[site]) and torch.equal(tiny.run_with_cache(tokens)[1][site], store[site])
    steered = tiny.run_with_hooks(tokens, fwd_hooks=[hook])
    assert not torch.allclose(steered, plain)
    with tiny.hooks(fwd_hooks=[hook]):
        assert torch.equal(tiny(tokens), steered)
    tiny.add_hook(*hook)
    assert torch.equal(tiny(tokens), steered)
    tiny.reset_hooks()
    assert torch.equal(tiny(tokens), plain)


def test_upstream_really_ignores_what_we_refuse(tiny_folder, sae, tokens) -> None:
    """The twin: the silent no-ops of DESIGN.md fact 2 in SAELens's own bridge. If this fails, upstream was repaired."""
    from transformers import AutoTokenizer

    def fires(model, site: str) -> bool:
        seen = []
        model.run_with_hooks(tokens, fwd_hooks=[(site, lambda activation, hook: seen.append(1))])
        return bool(seen)

    bridge = SAETransformerBridge.boot_transformers(str(tiny_folder), tokenizer=AutoTokenizer.from_pretrained(tiny_folder), device="cpu")
    assert not fires(bridge, SPELLINGS[0])  # an alias, on a raw bridge
    assert not fires(bridge, "blocks.1.hook_typo")
    bridge.add_sae(sae)
    assert not any(fires(bridge, site) for site in SPELLINGS)
    bridge.reset_saes()
    assert not fires(bridge, SPELLINGS[1])


def test_with_an_sae_attached_the_site_means_what_flows_on(tiny, sae, tokens) -> None:
    store = {}
    tiny.add_sae(sae)
    tiny.run_with_hooks(tokens, fwd_hooks=[record(SPELLINGS[0], store), record("blocks.2.hook_in", store)])
    assert torch.equal(store[SPELLINGS[0]], store["blocks.2.hook_in"])


def test_names_are_put_together_once_per_state(tiny, sae, tokens, monkeypatch) -> None:
    from blockem_tl.models.load import Model

    made, original = [], Model._named_points
    monkeypatch.setattr(Model, "_named_points", lambda self: made.append(1) or original(self))
    for count, change in enumerate((lambda: None, lambda: tiny.add_sae(sae), tiny.reset_saes, tiny.enable_compatibility_mode), start=1):
        change()
        for site in SPELLINGS:
            store = {}
            tiny.run_with_hooks(tokens, fwd_hooks=[record(site, store)])
            assert store[site].shape == (3, 11, 32)
        assert len(made) <= count + 1  # a change may ask in between
    before = len(made)
    tiny.hook_dict.clear()  # what is given is the caller's own
    assert SPELLINGS[0] in tiny.hook_dict and len(made) == before


@pytest.mark.parametrize("call", ["run_with_hooks", "hooks", "add_hook", "run_with_cache"])
def test_unknown_names_raise_everywhere(tiny, tokens, call) -> None:
    hook = record("blocks.1.hook_resid_pos", {})
    with pytest.raises(ValueError, match=r"unknown site.*close matches"):
        if call == "run_with_hooks":
            tiny.run_with_hooks(tokens, fwd_hooks=[hook])
        elif call == "hooks":
            with tiny.hooks(fwd_hooks=[hook]):
                tiny(tokens)
        elif call == "add_hook":
            tiny.add_hook(*hook)
        else:
            tiny.run_with_cache(tokens, names_filter=[hook[0]])


def test_sites_that_are_not_reached_raise(tiny, tokens) -> None:
    late = "blocks.3.hook_resid_post"
    with pytest.raises(HookNotFired):
        tiny.run_with_hooks(tokens, fwd_hooks=[record(late, {})], stop_at_layer=2)
    with pytest.raises(HookNotFired):
        tiny.run_with_cache(tokens, names_filter=late, stop_at_layer=2)
    with pytest.raises(ValueError, match="use_attn_result"):
        tiny.run_with_hooks(tokens, fwd_hooks=[record("blocks.1.attn.hook_result", {})])
    with pytest.raises(ValueError, match="use add_hook"), tiny.hooks(fwd_hooks=[record(late, {})], reset_hooks_end=False):
        pass


def test_filters_on_names_reach_each_site_once(tiny, tokens) -> None:
    seen = []
    tiny.run_with_hooks(
        tokens, fwd_hooks=[(lambda name: name.endswith("hook_resid_post"), lambda activation, hook: seen.append(hook.name))]
    )
    assert seen == [f"blocks.{i}.hook_out" for i in range(4)]


def test_hooks_may_come_from_a_generator(tiny, tokens) -> None:
    steered = tiny.run_with_hooks(tokens, fwd_hooks=[steer(SPELLINGS[0], torch.ones(32))])
    assert torch.equal(tiny.run_with_hooks(tokens, fwd_hooks=(h for h in [steer(SPELLINGS[0], torch.ones(32))])), steered)


def test_edits_at_resid_mid_are_refused_because_they_would_miss_the_stream(tiny, tokens) -> None:
    store, site = {}, "blocks.1.hook_resid_mid"
    tiny.run_with_hooks(tokens, fwd_hooks=[record(site, store)])
    assert store[site].shape == (3, 11, 32)
    for edit in (steer(site, torch.ones(32)), steer(site, torch.ones(32), 0.0)):
        with pytest.raises(ValueError, match="would not reach the residual stream"):
            tiny.run_with_hooks(tokens, fwd_hooks=[edit])


def test_arguments_that_would_be_ignored_are_refused(tiny, tokens) -> None:
    with pytest.raises(ValueError, match="always see the batch axis"):
        tiny.run_with_hooks(tokens[:1], fwd_hooks=[record(SPELLINGS[0], {})], remove_batch_dim=True)
    with pytest.raises(ValueError, match="selects none"):
        tiny.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_typo"))


def test_an_adapter_with_dropout_is_loaded_in_eval_mode(tiny, tiny_folder, tokens, tmp_path) -> None:
    tiny.add_adapter("tuned", dropout=0.5)
    perturb(tiny, "tuned")
    tiny.save_adapter(tmp_path / "tuned")
    loaded = load_model(tiny_folder, tmp_path / "tuned", device="cpu")
    assert torch.equal(loaded(tokens), loaded(tokens))
    assert torch.equal(loaded(tokens), tiny(tokens))
    loaded.original_model.train()
    assert not torch.equal(loaded(tokens), loaded(tokens))
