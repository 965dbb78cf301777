"""SAE folders and latent cards that are not what they say: refused by name, before anything runs on them."""

import json

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig, Transcoder, TranscoderConfig
from safetensors.torch import load_file, save_file
from shared import SITES, sae_at, set_of

from blockem_tl import LatentSet, load_sae
from blockem_tl.saes.load import check_fits, site_of


def saved(tmp_path, kind: str = "standard"):
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48)) if kind == "standard" else TopKSAE(TopKSAEConfig(d_in=32, d_sae=48, k=4))
    sae.cfg.metadata.hook_name = SITES[0]
    sae.save_model(str(tmp_path / "sae"))
    return tmp_path / "sae"


def with_config(folder, **changes) -> None:
    path = folder / "cfg.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v != "absent"}))


CONFIGS = {
    "no d_in": {"d_in": "absent"},
    "no d_sae": {"d_sae": "absent"},
    "no kind": {"architecture": "absent"},
    "an unknown kind": {"architecture": "marvellous"},
    "a width that is no number": {"d_in": "32"},
    "a width of nought": {"d_sae": 0},
    "half a latent": {"d_sae": 48.5},
    "true latents": {"d_sae": True},
    "another width": {"d_in": 64},
    "fewer latents than weights": {"d_sae": 40},
    "more latents than weights": {"d_sae": 64},
    "another kind": {"architecture": "jumprelu"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_that_does_not_fit_is_refused(name, tmp_path) -> None:
    folder = saved(tmp_path)
    assert isinstance(load_sae(folder, device="cpu"), SAE)
    with_config(folder, **CONFIGS[name])
    with pytest.raises(ValueError, match=str(folder)):
        load_sae(folder, device="cpu")


@pytest.mark.parametrize("k", ["absent", None, 0, -1, 49, "4", True, float("nan")])
def test_a_topk_without_a_right_k_is_refused(k, tmp_path) -> None:
    folder = saved(tmp_path, "topk")
    assert load_sae(folder, device="cpu").cfg.architecture() == "topk"
    with_config(folder, k=k)
    with pytest.raises(ValueError, match=r"cfg.json: expected (whole numbers above 0 \(and k at most d_sae\), .*got .*'k'|a file of JSON)"):
        load_sae(folder, device="cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", "[" * 100_000])
def test_a_configuration_that_is_no_json_is_refused(content, tmp_path) -> None:
    folder = saved(tmp_path)
    (folder / "cfg.json").write_text(content)
    with pytest.raises(ValueError, match="cfg.json: expected"):
        load_sae(folder, device="cpu")


WEIGHTS = {
    "NaN": lambda w: {**w, "W_dec": w["W_dec"].index_fill(0, torch.tensor([3]), float("nan"))},
    "infinity": lambda w: {**w, "b_enc": w["b_enc"] / 0 + 1 / torch.zeros(())},
    "missing": lambda w: {name: tensor for name, tensor in w.items() if name != "b_enc"},
    "transposed": lambda w: {**w, "W_enc": w["W_enc"].T.contiguous()},
    "extra": lambda w: {**w, "threshold": torch.zeros(48)},
    "none": lambda w: {},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name, tmp_path) -> None:
    folder = saved(tmp_path)
    path = folder / "sae_weights.safetensors"
    save_file(WEIGHTS[name](load_file(path)), path)
    with pytest.raises(ValueError, match=str(folder)):
        load_sae(folder, device="cpu")


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, None])
def test_weights_that_cannot_be_read_are_refused(content, tmp_path) -> None:
    folder = saved(tmp_path)
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match="the SAE's weights are broken, or do not fit its configuration"):
        load_sae(folder, device="cpu")


def test_an_sae_that_broke_after_loading_is_refused_where_it_is_used(tiny) -> None:
    sae = sae_at(SITES[0])
    assert check_fits(sae, tiny) == SITES[0]
    sae.W_enc.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="got NaN or infinity in W_enc"):
        check_fits(sae, tiny)


def test_a_transcoder_is_no_sae_of_one_site(tiny) -> None:
    """It would be steered at the site that it reads, along the directions that it writes elsewhere."""
    transcoder = Transcoder(TranscoderConfig(d_in=32, d_sae=48, d_out=32, apply_b_dec_to_input=False))
    transcoder.cfg.metadata.hook_name, transcoder.cfg.metadata.hook_name_out = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    with pytest.raises(
        ValueError, match="this is a transcoder: it reads at blocks.1.ln2.hook_normalized and writes at blocks.1.hook_mlp_out"
    ):
        site_of(transcoder)
    sae = sae_at(SITES[0])
    sae.cfg.metadata.hook_name_out = SITES[0]  # some releases name the same site twice
    assert site_of(sae) == SITES[0]


# ---------------------------------------------------------------------------------------------- latent cards

CARDS = {
    "latents of floats": {"latents": [4.0, 9.0, 16.0, 21.0]},
    "latents of true": {"latents": [True, 9, 16, 21]},
    "signs of floats": {"signs": [1.0, -1.0, 1.0, -1.0]},
    "signs of true": {"signs": [True, -1, 1, -1]},
    "shifts of text": {"shifts": ["1", "2", "3", "4"]},
    "latents as text": {"latents": "4"},
    "a d_sae that is no number": {"d_sae": "48"},
    "half a d_sae": {"d_sae": 48.0},
    "a site that is none": {"site": 5},
    "a hash that is none": {"sae_fingerprint": None},
    "selection prompts as text": {"selection_prompts": "abc"},
    "selection prompts as numbers": {"selection_prompts": [1, 2]},
    "selection prompts of another length": {"selection_prompts": ["abc"]},
    "scores without selection prompts": {"scores": [0.5, 0.4, 0.3, 0.2], "selection_prompts": []},
    "provenance as text": {"provenance": "mine"},
    "an unknown field": {"colour": "red"},
    "another format": {"format": 99},
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_with_a_wrong_field_is_refused(name, tmp_path) -> None:
    path = set_of(sae_at(SITES[0])).save(tmp_path / "k.json")
    assert len(LatentSet.load(path)) == 4
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, **CARDS[name]}))
    with pytest.raises(ValueError, match="k.json"):
        LatentSet.load(path)


@pytest.mark.parametrize(("field", "text"), [("scores", "NaN"), ("shifts", "Infinity"), ("shifts", "-Infinity"), ("d_sae", "1e999")])
def test_numbers_that_are_none_are_refused_in_cards(field, text, tmp_path) -> None:
    path = set_of(sae_at(SITES[0])).save(tmp_path / "k.json")
    card = json.loads(path.read_text())
    value = "0" if field == "d_sae" else "[0, 0, 0, 0]"
    card[field] = "HERE"
    path.write_text(json.dumps(card).replace('"HERE"', value.replace("0", text, 1)))
    with pytest.raises(ValueError, match="k.json"):
        LatentSet.load(path)


@pytest.mark.parametrize("content", ["", "[]", '"text"', "[" * 100_000, '{"format": 1}'])
def test_a_card_that_is_none_is_refused(content, tmp_path) -> None:
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(ValueError, match="k.json"):
        LatentSet.load(tmp_path / "k.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match="folder.json: expected a file of JSON"):
        LatentSet.load(tmp_path / "folder.json")
