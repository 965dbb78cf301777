"""Patching equals references that recompute everything, at every site, batched, left-padded and refilled; and each check can fail."""

from contextlib import nullcontext
from functools import partial
from hashlib import blake2b

import numpy as np
import pytest
import torch
from shared import perturb
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from blockem_tl import HookNotFired, Prompt, generate, load_model, patch, record
from blockem_tl.analysis.patching.decoding import LockstepDecoder, decode_patching
from blockem_tl.analysis.patching.endpoints import UNPATCHED, plan_steps
from blockem_tl.analysis.patching.prompt import prompt_patching_stream
from blockem_tl.analysis.patching.sweep import patching_sweep
from blockem_tl.data.chat import encode_prompts

POST = [f"blocks.{n}.hook_resid_post" for n in range(4)]
PROMPTS = [Prompt(id=str(n), text=" ".join(f"w{(7 * n + i) % 57}" for i in range(n))) for n in (1, 4, 2, 9, 5)]
OPTIONS = {"max_new_tokens": 6, "progress": False}


@pytest.fixture
def tuned(tiny):
    """The tiny model with an adapter that changes what it says, and many tokens that end a reply."""
    tiny.add_adapter("tuned")
    perturb(tiny, "tuned")
    tiny.original_model.generation_config.eos_token_id = [2, *range(7, 11)]
    return tiny


def replies(generations):
    return [(g.prompt.id, g.reply_ids, g.truncated) for g in generations]


def grouped(sites):
    return [(site,) if isinstance(site, str) else site for site in sites]


def swept(model, sites, **options):
    found = dict(prompt_patching_stream(model, PROMPTS, grouped(sites), **{**OPTIONS, **options}))
    return {site: replies(found[group]) for site, group in zip(sites, grouped(sites), strict=True)}


# ------------------------------------------------------------------------------------------------ references that recompute everything


@torch.no_grad()
def states_of(model, ids, sites):
    store = {}
    model.run_with_hooks(ids, fwd_hooks=[record(site, store) for site in sites])
    return store


@torch.no_grad()
def patched_logits(model, ids, source, sites, where, *, source_model=None):
    """[pos d_vocab] of the model as it stands, with ``source``'s states (a context) at ``sites`` where ``where`` [1 pos] says so."""
    with source:
        states = states_of(source_model or model, ids, sites)
    with model.hooks(fwd_hooks=[patch(site, states[site], where) for site in sites]):
        return model(ids)[0]


def uniforms(prompt, name, seed, count):
    """The random numbers that a row draws from (see generate)."""
    own = int.from_bytes(blake2b(f"{name}\0{prompt.id}".encode(), digest_size=8).digest(), "big")
    return np.random.default_rng((seed, own)).random(count)


def recomputed(model, prompt, sites, positions, *, source=None, name="", temperature=0.0, seed=0, max_new_tokens=6, source_model=None):
    """The reply by recomputing the full prefix under both arms at every step; positions(n_prompt, length) are those that are patched."""
    ids = list(encode_prompts(model.tokenizer, [prompt])[0].ids)
    n, stops, draws = len(ids), model.original_model.generation_config.eos_token_id, uniforms(prompt, name, seed, max_new_tokens)
    stops = {2, *(stops if isinstance(stops, list) else [])}
    for step in range(max_new_tokens):
        where = torch.zeros(1, len(ids), dtype=torch.bool)
        where[0, list(positions(n, len(ids)))] = True
        logits = patched_logits(
            model, torch.tensor([ids]), (source or partial(model.using, "base"))(), sites, where, source_model=source_model
        )[-1]
        if temperature == 0:
            token = int(logits.argmax())
        else:
            token = int(torch.searchsorted((logits.double() / temperature).softmax(-1).cumsum(-1), draws[step], right=True))
        if token in stops:
            return prompt.id, tuple(ids[n:]), False
        ids.append(token)
    return prompt.id, tuple(ids[n:]), True


def prompt_positions(n, length):
    return range(n)


# ------------------------------------------------------------------------------------------------ prompt patching


GROUPS = [
    *POST,
    "blocks.0.hook_resid_pre",
    "blocks.2.hook_resid_pre",
    "blocks.2.hook_attn_out",
    "blocks.3.hook_mlp_out",
    "hook_embed",
    ("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out"),
    ("blocks.2.hook_resid_post", "blocks.0.hook_resid_post", "blocks.3.hook_attn_out"),
    (),
]


def test_the_sweep_equals_recomputing_both_models_for_every_site_and_step(tuned) -> None:
    found = swept(tuned, GROUPS)
    assert set(found) == set(GROUPS)
    for group in GROUPS:
        sites = [group] if isinstance(group, str) else list(group)
        assert found[group][:2] == [recomputed(tuned, prompt, sites, prompt_positions) for prompt in PROMPTS[:2]], group
    assert len({tuple(found[site]) for site in POST}) == 4 and found[POST[3]] != found[()]  # the sites differ, so the check could fail
    assert len({len(ids) for _, ids, _ in found[()]}) > 1  # rows left at different steps
    assert swept(tuned, GROUPS, batch_size=3) == found  # refilled, and part of the prompts after part


def test_a_prompt_patched_one_position_short_is_another_prompt(tuned) -> None:
    found = swept(tuned, POST)
    short = [recomputed(tuned, prompt, POST[1:2], lambda n, length: range(n - 1)) for prompt in PROMPTS]
    own = [recomputed(tuned, prompt, POST[1:2], prompt_positions, source=nullcontext) for prompt in PROMPTS]  # the adapter left on
    assert found[POST[1]] != short and found[POST[1]] != own


def test_an_empty_group_is_the_target_and_every_site_speaks_for_itself(tuned) -> None:
    named = dict(prompt_patching_stream(tuned, PROMPTS, grouped([(), POST[1]]), **OPTIONS))
    assert replies(named[()]) == replies(generate(tuned, PROMPTS, **OPTIONS))
    assert {g.condition for g in named[()]} == {UNPATCHED}
    assert {g.condition for g in named[(POST[1],)]} == {f"base into tuned over the prompt at {POST[1]}"}


def test_sampled_sweeps_equal_the_reference_and_do_not_depend_on_the_batch(tuned) -> None:
    options = {"temperature": 1.0, "seed": 3}
    found = swept(tuned, POST[1:3], **options)
    assert found == swept(tuned, POST[1:3], batch_size=2, **options) != swept(tuned, POST[1:3], temperature=1.0, seed=4)
    name = f"base into tuned over the prompt at {POST[1]}"
    assert found[POST[1]] == [recomputed(tuned, prompt, POST[1:2], prompt_positions, name=name, **options) for prompt in PROMPTS]


def test_the_reverse_direction_patches_tuned_into_base(tuned) -> None:
    found = swept(tuned, [POST[2], ()], source="tuned", target="base")
    with tuned.using("base"):
        assert found[()] == replies(generate(tuned, PROMPTS, **OPTIONS)) != found[POST[2]]
    for row, prompt in zip(found[POST[2]], PROMPTS, strict=True):
        assert row == reverse(tuned, prompt)
    assert tuned.active_adapter == "tuned"


def reverse(model, prompt):
    ids = list(encode_prompts(model.tokenizer, [prompt])[0].ids)
    n = len(ids)
    while len(ids) < n + 6:
        states = states_of(model, torch.tensor([ids]), [POST[2]])
        where = torch.arange(len(ids))[None] < n
        with model.using("base"), torch.no_grad(), model.hooks(fwd_hooks=[patch(POST[2], states[POST[2]], where)]):
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in (2, *range(7, 11)):
            return prompt.id, tuple(ids[n:]), False
        ids.append(token)
    return prompt.id, tuple(ids[n:]), True


def test_another_model_can_be_the_source(tuned, tiny_folder) -> None:
    other = load_model(tiny_folder, device="cpu")
    assert swept(tuned, POST, source=other) == swept(tuned, POST)


def test_patching_own_states_changes_nothing(tuned, tiny_folder) -> None:
    other = load_model(tiny_folder, device="cpu")
    other.add_adapter("tuned")
    perturb(other, "tuned")
    plain = replies(generate(tuned, PROMPTS, **OPTIONS))
    own = swept(tuned, GROUPS, source=other)
    assert all(rows == plain for rows in own.values())
    perturb(other, "tuned", seed=4)
    assert all(rows != plain for site, rows in swept(tuned, POST, source=other).items())


def test_logits_are_base_up_to_the_site_and_tuned_after_it(tuned) -> None:
    """Against the blocks of plain transformers, called one by one: no hook, no bridge, no cache."""
    ids = torch.tensor([encode_prompts(tuned.tokenizer, PROMPTS[3:4])[0].ids])
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    for block, site in enumerate(POST):
        expected = relay(tuned, ids, block)
        torch.testing.assert_close(patched_logits(tuned, ids, tuned.using("base"), [site], everywhere), expected, atol=1e-4, rtol=1e-4)
        short = everywhere.clone()
        short[0, 0] = False
        assert block == 3 or not torch.allclose(patched_logits(tuned, ids, tuned.using("base"), [site], short)[-1], expected[-1], atol=1e-3)


@torch.no_grad()
def relay(model, ids, last_base):
    """Base's embedding and blocks up to ``last_base``, tuned's blocks above, called one by one."""
    inner = model.original_model.model
    position_ids = torch.arange(ids.shape[1])[None]
    mask = torch.full((ids.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    state = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(state, position_ids=position_ids)
    for number, layer in enumerate(inner.layers):
        with model.using("base") if number <= last_base else nullcontext():
            state = layer(state, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids, use_cache=False)
    return model.original_model.lm_head(inner.norm(state))[0]


# ------------------------------------------------------------------------------------------------ decode patching


def decoded(model, sites, **options):
    return replies(decode_patching(model, PROMPTS, groups=grouped([sites]), **{**OPTIONS, **options}))


def steps_at(start, stop):
    """The positions that a window of decoding steps patches: step t runs on position n_prompt - 1 + t."""
    return lambda n, length: range(max(start, 0) + n - 1, min(stop + n - 1, length))


DECODED = {
    "paper": (POST[1], {}, steps_at(0, 99)),
    "formula": (POST[1], {"last_prompt_position": False}, steps_at(1, 99)),
    "resid_pre": ("blocks.1.hook_resid_pre", {}, steps_at(0, 99)),
    "last_site": (POST[3], {}, steps_at(0, 99)),
    "two_sites": ((POST[0], POST[2]), {}, steps_at(0, 99)),
    "site_and_component": (("blocks.3.hook_attn_out", POST[1]), {}, steps_at(0, 99)),
    "component": ("blocks.2.hook_mlp_out", {}, steps_at(0, 99)),
    "early_window": (POST[2], {"steps": (0, 2)}, steps_at(0, 2)),
    "late_window": (POST[2], {"steps": (2, None)}, steps_at(2, 99)),
    "inner_window": ((POST[0], POST[2]), {"steps": (1, 3)}, steps_at(1, 3)),
}


@pytest.mark.parametrize("case", DECODED)
def test_lockstep_equals_recomputing_both_prefixes_at_every_step(tuned, case) -> None:
    sites, options, positions = DECODED[case]
    found = decoded(tuned, sites, **options)
    names = [sites] if isinstance(sites, str) else list(sites)
    assert found[:4] == [recomputed(tuned, prompt, names, positions) for prompt in PROMPTS[:4]]
    assert decoded(tuned, sites, batch_size=2, **options) == found  # left-padded otherwise, and refilled
    assert found != replies(generate(tuned, PROMPTS, **OPTIONS))


def test_windows_sites_and_the_last_prompt_position_matter(tuned) -> None:
    """The reference is sensitive to these, so that equality with it says something."""
    found = [decoded(tuned, sites, **options) for sites, options, _ in DECODED.values()]
    assert len({tuple(rows) for rows in found}) == len(found)
    paper = [recomputed(tuned, prompt, [POST[1]], steps_at(0, 99)) for prompt in PROMPTS]
    late = [recomputed(tuned, prompt, [POST[1]], lambda n, length: range(n - 1, length - 1)) for prompt in PROMPTS]  # one short
    assert late != paper == found[0]


def test_sampled_lockstep_equals_the_sampled_reference(tuned) -> None:
    options = {"temperature": 1.0, "seed": 3}
    found = decode_patching(tuned, PROMPTS, [POST[1]], **OPTIONS, **options)
    name = found[0].condition
    assert "base into tuned over decoding steps 0 to the end with the last prompt position" in name
    expected = [recomputed(tuned, prompt, POST[1:2], steps_at(0, 99), name=name, **options) for prompt in PROMPTS]
    assert replies(found) == expected == decoded(tuned, POST[1], batch_size=2, **options)
    assert decoded(tuned, POST[1], temperature=1.0, seed=4) != expected


def test_the_result_says_what_was_patched_and_how_often(tuned) -> None:
    found = decode_patching(tuned, PROMPTS, [POST[1]], steps=(2, 4), **OPTIONS)
    (name,) = {g.condition for g in found}
    assert name == f"base into tuned over decoding steps 2 to 3 without the last prompt position at {POST[1]}"
    made = [len(g.reply_ids) + (not g.truncated) for g in found]
    assert found.columns["patched_steps"] == tuple(min(max(n - 2, 0), 2) for n in made)
    assert len(set(found.columns["patched_steps"])) > 1
    assert "with the last prompt position" in decode_patching(tuned, PROMPTS, [POST[1]], **OPTIONS)[0].condition


def test_one_call_sweeps_sites_over_the_prompt_and_while_decoding(tuned) -> None:
    found = patching_sweep(tuned, PROMPTS, [POST[1]], groups=[(POST[0], POST[2])], when=["prompt", "decode"], **OPTIONS)
    names = ["unpatched", POST[1], f"{POST[0]} + {POST[2]}", POST[1], f"{POST[0]} + {POST[2]}"]
    assert found.columns["site"] == tuple(name for name in names for _ in PROMPTS)
    assert found.columns["patched"] == tuple(kind for kind in ("unpatched", "prompt", "prompt", "decode", "decode") for _ in PROMPTS)
    over = swept(tuned, [(), POST[1], (POST[0], POST[2])])
    expected = [*over.values(), decoded(tuned, POST[1]), decoded(tuned, (POST[0], POST[2]))]
    assert replies(found) == [row for rows in expected for row in rows]
    assert replies(found.where(patched="decode", site=POST[1])) == decoded(tuned, POST[1]) != over[POST[1]]
    every = patching_sweep(tuned, PROMPTS, unpatched=False, **OPTIONS)
    assert list(dict.fromkeys(every.columns["site"])) == POST


def test_endpoints_may_lie_in_folders(tuned, tmp_path) -> None:
    folder = tuned.save_adapter(tmp_path / "saved", "tuned")
    expected = swept(tuned, POST[:2]), decoded(tuned, POST[1])
    reverse = swept(tuned, POST[1:2], source="tuned", target="base")
    tuned.remove_adapter("tuned")
    assert (swept(tuned, POST[:2], target=folder), decoded(tuned, POST[1], target=folder)) == expected
    assert swept(tuned, POST[1:2], source=folder, target="base") == reverse != {POST[1]: expected[0][POST[1]]}
    assert tuned.adapters == []


def test_lockstep_with_another_model_and_with_own_states(tuned, tiny_folder) -> None:
    other = load_model(tiny_folder, device="cpu")
    two = (POST[0], POST[2])
    assert decoded(tuned, two, source=other) == decoded(tuned, two)
    assert decoded(tuned, POST[1], source=other, steps=(1, 3)) == decoded(tuned, POST[1], steps=(1, 3))
    other.add_adapter("tuned")
    perturb(other, "tuned")
    plain = replies(generate(tuned, PROMPTS, **OPTIONS))
    assert decoded(tuned, two, source=other) == plain != decoded(tuned, two)


def test_the_lower_blocks_of_the_target_rest_only_where_nothing_can_see_them(tuned, monkeypatch) -> None:
    """With the plan of a whole window forced on a part of it, the replies are wrong: the check above can fail."""
    right = decoded(tuned, POST[2], steps=(0, 2))
    begin = LockstepDecoder.__init__

    def forced(self, *args, lockstep, **options):
        begin(self, *args, lockstep=lockstep, **options)
        self.plan = plan_steps(tuned, lockstep.sites)

    monkeypatch.setattr(LockstepDecoder, "__init__", forced)
    assert decoded(tuned, POST[2], steps=(0, 2)) != right


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        ("blocks.1.hook_typo", {}, "lacks a site"),
        ((), {}, "at least one site in each"),
        (POST[1], {"target": "base"}, "source and target are both 'base'"),
        (POST[1], {"steps": (6, None)}, "begins at decoding step 6"),
        (POST[1], {"steps": (3, 3)}, "0 <= start < stop"),
        (POST[1], {"steps": (-1, 3)}, "0 <= start < stop"),
        (POST[1], {"steps": (0, 1), "last_prompt_position": False}, "begins at decoding step 1"),
        (POST[1], {"max_new_tokens": [1, 6, 6, 6, 6], "last_prompt_position": False}, r"nothing is left to patch for \['1'\]"),
        (POST[1], {"max_new_tokens": 90}, "shorten the prompt"),
    ],
)
def test_bad_decode_time_patches_are_refused_before_any_work(tuned, sites, options, message, monkeypatch) -> None:
    monkeypatch.setattr(LockstepDecoder, "_forward", None)
    with pytest.raises(ValueError, match=message):
        decode_patching(tuned, PROMPTS, groups=grouped([sites]), **{**OPTIONS, **options})


def test_a_window_that_no_reply_reaches_raises(tuned) -> None:
    tuned.original_model.generation_config.eos_token_id = list(range(64))
    with pytest.raises(HookNotFired, match="every reply ended before"):
        decode_patching(tuned, PROMPTS, [POST[1]], steps=(2, None), **OPTIONS)


# ------------------------------------------------------------------------------------------------ architectures and bad input


TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "initializer_range": 0.3}
LLAMA_LIKE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARCHITECTURES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TINY, num_hidden_layers=3, num_key_value_heads=2), LLAMA_LIKE),
    "gemma2": (
        Gemma2ForCausalLM,
        Gemma2Config(**TINY, num_hidden_layers=3, num_key_value_heads=2, head_dim=8, sliding_window=5),
        LLAMA_LIKE,
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=96, initializer_range=0.3),
        ("mlp.c_proj", "mlp.c_fc"),
    ),
    "pythia": (GPTNeoXForCausalLM, GPTNeoXConfig(**TINY, num_hidden_layers=3), ("dense_h_to_4h", "dense_4h_to_h")),
}


@pytest.fixture(params=ARCHITECTURES)
def other_architecture(request, tiny_folder):
    kind, config, targets = ARCHITECTURES[request.param]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = load_model(kind(config).eval(), tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    model.add_adapter("tuned", target_modules=targets)
    perturb(model, "tuned", std=0.5)
    return model


def test_both_kinds_are_right_on_other_architectures(other_architecture) -> None:
    model, sites = other_architecture, ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post", "blocks.1.hook_mlp_out"]
    found = swept(model, sites, batch_size=4)
    for site in sites:
        assert found[site][1:3] == [recomputed(model, prompt, [site], prompt_positions) for prompt in PROMPTS[1:3]]
    assert found[sites[0]] != found[sites[2]]
    lockstep = decoded(model, sites[0], batch_size=2)
    assert lockstep[1:3] == [recomputed(model, prompt, sites[:1], steps_at(0, 99)) for prompt in PROMPTS[1:3]]
    assert lockstep != found[sites[0]]


@pytest.mark.parametrize(
    ("sites", "options", "message"),
    [
        (["blocks.1.hook_typo"], {}, "lacks a site.*unknown site 'blocks.1.hook_typo'"),
        (["blocks.1.attn.hook_q"], {}, "cannot be steered or patched"),
        (["blocks.1.hook_resid_mid"], {}, "only the input of the MLP's norm"),
        ([], {"groups": [("blocks.1.hook_resid_post", "blocks.1.hook_out")]}, "each site of a group once"),
        ("blocks.1.hook_resid_post", {}, "a list of sites"),
        (POST, {"when": []}, r"when='prompt', 'decode' or \['prompt', 'decode'\]"),
        (POST, {"target": "base"}, "source and target are both 'base'"),
        (POST, {"source": "tuned"}, "source and target are both 'tuned'"),
        (POST, {"source": "early"}, "unknown adapter 'early'"),
        (POST, {"max_new_tokens": 90}, "shorten the prompt"),
        (POST, {"batch_size": 0}, "batch_size >= 1"),
        ([*POST, POST[0]], {}, "distinct"),
        ([], {}, "at least one"),
    ],
)
def test_bad_sweeps_are_refused_before_any_work(tuned, sites, options, message, monkeypatch) -> None:
    monkeypatch.setattr("blockem_tl.analysis.patching.prompt.share", None)
    with pytest.raises(ValueError, match=message):
        patching_sweep(tuned, PROMPTS, sites, **{**OPTIONS, **options})


def test_without_an_acting_adapter_there_is_nothing_to_patch(tiny, tuned) -> None:
    with tuned.using("base"), pytest.raises(ValueError, match="source and target are both 'base'"):
        patching_sweep(tuned, PROMPTS, POST, **OPTIONS)
    tuned.remove_adapter("tuned")
    with pytest.raises(ValueError, match="load an adapter|Load an adapter"):
        patching_sweep(tuned, PROMPTS, POST, **OPTIONS)


def test_a_site_that_only_one_of_the_models_has_is_refused(tuned, tiny_folder) -> None:
    shorter = AutoModelForCausalLM.from_pretrained(tiny_folder, num_hidden_layers=2, attn_implementation="eager")
    other = load_model(shorter, tokenizer=tuned.tokenizer)
    assert swept(tuned, POST[:2], source=other) == swept(tuned, POST[:2])  # its blocks are base's first two
    with pytest.raises(ValueError, match="lacks a site to patch: unknown site 'blocks.2"):
        patching_sweep(tuned, PROMPTS, POST, source=other, **OPTIONS)


def test_models_that_do_not_share_their_tokens_are_refused(tuned, tiny_folder) -> None:
    other = load_model(tiny_folder, device="cpu")
    other.tokenizer.chat_template = other.tokenizer.chat_template + " "
    with pytest.raises(ValueError, match="different tokenizers or chat templates"):
        patching_sweep(tuned, PROMPTS, POST, source=other, **OPTIONS)


def test_the_model_is_as_it_was_after_a_sweep_that_is_left_early(tuned) -> None:
    before = replies(generate(tuned, PROMPTS, **OPTIONS))
    for _ in prompt_patching_stream(tuned, PROMPTS, grouped(POST), **OPTIONS):
        assert replies(generate(tuned, PROMPTS, **OPTIONS)) == before
        break
    assert replies(generate(tuned, PROMPTS, **OPTIONS)) == before
    assert all(not point.fwd_hooks for point in tuned.hook_dict.values()) and not any("forward" in vars(b) for b in tuned.blocks)
