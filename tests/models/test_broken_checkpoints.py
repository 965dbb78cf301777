"""Checkpoints whose weights are not what they say, and tokenizers given by the user: refused by name, or used as they stand."""

import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from blockem_tl import Prompt, generate, load_model
from blockem_tl.data.chat import encode_prompts
from blockem_tl.generation.reply_fn import model_identity


def changed(tiny_folder, tmp_path, change):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


CHANGES = {
    "a block's tensors are missing": (lambda w: {n: t for n, t in w.items() if ".layers.2." not in n}, "lacks 9 tensors"),
    "one tensor is missing": (lambda w: {n: t for n, t in w.items() if n != "model.norm.weight"}, r"lacks 1 tensors \(\['model.norm"),
    "NaN": (lambda w: {n: t.masked_fill(t > 0.9, float("nan")) for n, t in w.items()}, "expected finite weights, got NaN or infinity in"),
    "infinity": (lambda w: {n: t / 0 if n.endswith("up_proj.weight") else t for n, t in w.items()}, "up_proj"),
    "other shapes": (lambda w: {n: t[:, :-1].contiguous() if "down_proj" in n else t for n, t in w.items()}, "cannot load|shapes"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_is_not_whole_is_refused(name, tiny_folder, tmp_path) -> None:
    change, message = CHANGES[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        load_model(changed(tiny_folder, tmp_path, change), device="cpu")


def test_a_checkpoint_that_is_whole_loads(tiny_folder, tmp_path, tokens) -> None:
    folder = changed(tiny_folder, tmp_path, lambda weights: weights)
    assert torch.equal(load_model(folder, device="cpu")(tokens), load_model(tiny_folder, device="cpu")(tokens))


# ---------------------------------------------------------------------------------------------- the user's own tokenizer


@pytest.fixture
def own(tokenizer_folder) -> PreTrainedTokenizerFast:
    """Another template, another padding token, one new token; never saved anywhere."""
    saved = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=deepcopy(saved.backend_tokenizer), bos_token="<bos>", eos_token="<end>", unk_token="<unk>", pad_token="w0"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["w56"]})
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} w5 {{ m.content }}{% endfor %} w6"
    return tokenizer


@pytest.mark.parametrize("loaded", [False, True])
def test_the_tokenizer_given_is_the_one_used_as_it_stands(loaded, own, tiny_folder) -> None:
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder) if loaded else tiny_folder
    before = (own.chat_template, own.pad_token, own.bos_token, own.padding_side, len(own))
    model = load_model(hf, tokenizer=own, **({} if loaded else {"device": "cpu"}))
    assert model.tokenizer is own
    assert (own.chat_template, own.pad_token, own.bos_token, own.padding_side, len(own)) == before
    assert model.pad_id == own.convert_tokens_to_ids("w0")
    (row,) = encode_prompts(model.tokenizer, [Prompt(id="1", text="w9")])
    assert own.convert_ids_to_tokens(list(row.ids)) == ["<bos>", "w5", "w9", "w6"]
    assert len(generate(model, [Prompt(id="1", text="w9")], max_new_tokens=3, progress=False)) == 1


def test_template_arguments_change_a_copy_and_the_identity(own, tiny_folder) -> None:
    own.chat_template = (
        "{{ bos_token }}{% if loud is defined and loud %} w7{% endif %}{% for m in messages %} w5 {{ m.content }}{% endfor %} w6"
    )
    before = own.chat_template
    quiet = load_model(tiny_folder, tokenizer=own, device="cpu")
    loud = load_model(tiny_folder, tokenizer=own, template_arguments={"loud": True}, device="cpu")
    assert own.chat_template == before and quiet.tokenizer is own and loud.tokenizer is not own
    ids = [encode_prompts(model.tokenizer, [Prompt(id="1", text="w9")])[0].ids for model in (quiet, loud)]
    assert len(ids[1]) == len(ids[0]) + 1
    assert model_identity(quiet, None) != model_identity(loud, None)


def test_nothing_is_prepended_where_the_tokenizer_has_no_bos(own, tiny_folder) -> None:
    """TransformerLens's set-up would give it one, and put it before every text."""
    own.bos_token = None
    own.chat_template = own.chat_template.replace("{{ bos_token }}", "")
    model = load_model(tiny_folder, tokenizer=own, device="cpu")
    assert model.tokenizer.bos_token is None and model.to_tokens("w9 w8").tolist() == [own.convert_tokens_to_ids(["w9", "w8"])]
    with_bos = load_model(tiny_folder, device="cpu")
    assert with_bos.to_tokens("w9 w8")[0, 0] == with_bos.tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_takes_bfloat16_where_the_processor_has_it(capabilities, expected, tiny_folder, monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    model = load_model(tiny_folder, device="cpu", dtype="auto")
    assert {parameter.dtype for parameter in model.original_model.parameters()} == {expected}
    assert next(load_model(tiny_folder, device="cpu").original_model.parameters()).dtype == torch.float32
