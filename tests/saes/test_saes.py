"""Reading chosen latents equals the full encode, for every kind of SAE."""

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from blockem_tl import decoder_directions, encode_latents, load_sae
from blockem_tl.saes.latents import check_latents
from blockem_tl.saes.load import check_fits, site_of
from blockem_tl.storage.fingerprints import of_sae

LATENTS = [40, 3, 17, 3]


def batchtopk(tmp_path) -> SAE:
    """A BatchTopK SAE as it comes back from disk (as JumpReLU)."""
    training = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=32, d_sae=48, k=6))
    training.topk_threshold.fill_(0.4)
    training.save_inference_model(tmp_path)
    return SAE.load_from_disk(tmp_path)


KINDS = {
    "standard": lambda _: StandardSAE(StandardSAEConfig(d_in=32, d_sae=48)),
    "jumprelu": lambda _: JumpReLUSAE(JumpReLUSAEConfig(d_in=32, d_sae=48)),
    "gated": lambda _: GatedSAE(GatedSAEConfig(d_in=32, d_sae=48)),
    "topk": lambda _: TopKSAE(TopKSAEConfig(d_in=32, d_sae=48, k=6)),
    "batchtopk": batchtopk,
    "b_dec applied": lambda _: StandardSAE(StandardSAEConfig(d_in=32, d_sae=48, apply_b_dec_to_input=True)),
    "layer norm": lambda _: StandardSAE(StandardSAEConfig(d_in=32, d_sae=48, normalize_activations="layer_norm")),
}


@pytest.fixture(params=KINDS)
def sae(request, tmp_path) -> SAE:
    torch.manual_seed(0)
    sae = KINDS[request.param](tmp_path)
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    if hasattr(sae, "threshold"):
        sae.threshold.data.abs_()
    return sae


def test_chosen_latents_equal_the_full_encode_and_so_do_gradients(sae) -> None:
    x = torch.randn(2, 5, 32, requires_grad=True)
    full = sae.encode(x)[..., LATENTS]
    chosen = encode_latents(sae, x, LATENTS)
    torch.testing.assert_close(chosen, full)
    assert (full > 0).any() and (full == 0).any()  # the comparison saw latents on and off
    assert not torch.allclose(chosen, sae.encode(x)[..., [k + 1 for k in LATENTS]])
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), x, retain_graph=True)[0] for z in (chosen, full)))


def test_bf16_activations_are_read_in_the_saes_own_dtype() -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    assert encode_latents(sae, torch.randn(2, 5, 32, dtype=torch.bfloat16), LATENTS).dtype == torch.float32


def test_decoder_directions_are_unit_rows(sae) -> None:
    directions = decoder_directions(sae, LATENTS)
    torch.testing.assert_close(directions, sae.W_dec[LATENTS] / sae.W_dec[LATENTS].norm(dim=-1, keepdim=True))
    with pytest.raises(ValueError, match=r"0\.\.47.*got \[48\]"):
        decoder_directions(sae, [48])
    sae.W_dec.data[3] = 0
    with pytest.raises(ValueError, match=r"\[3, 3\] have zero decoder rows"):
        decoder_directions(sae, LATENTS)


def test_fingerprint_survives_the_disk_and_sees_every_weight(sae, tmp_path) -> None:
    before = of_sae(sae)
    sae.save_model(tmp_path / "copy")
    assert of_sae(SAE.load_from_disk(tmp_path / "copy")) == before
    sae.W_dec.data[0, 0] += 1e-3
    assert of_sae(sae) != before


def test_fingerprint_tells_equal_weights_with_another_k_apart() -> None:
    few, many = (TopKSAE(TopKSAEConfig(d_in=32, d_sae=48, k=k)) for k in (4, 32))
    many.load_state_dict(few.state_dict())
    assert of_sae(few) != of_sae(many)


def test_loading_from_a_folder_and_by_embedded_name(sae, tmp_path) -> None:
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path / "saved")
    assert site_of(load_sae(tmp_path / "saved")) == "blocks.1.hook_resid_post"
    assert load_sae("organism").cfg.architecture() == "topk"
    (tmp_path / "empty").mkdir()
    for name in ("no-such-sae", tmp_path / "empty"):
        with pytest.raises(ValueError, match="expected an embedded name, a SAELens folder"):
            load_sae(name)


def test_one_of_several_saes_of_a_folder_is_taken_by_its_id(tmp_path) -> None:
    for folder, site in ((".", "blocks.1.hook_resid_post"), ("two", "blocks.2.hook_resid_post")):
        torch.manual_seed(len(folder))
        sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
        sae.cfg.metadata.hook_name = site
        sae.save_model(tmp_path / folder)
    own, two = load_sae(tmp_path), load_sae(tmp_path, "two")
    assert (site_of(own), site_of(two)) == ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    assert of_sae(load_sae(tmp_path, "blocks.1.hook_resid_post")) == of_sae(own) != of_sae(two)
    with pytest.raises(ValueError, match="'three'.*there are two"):
        load_sae(tmp_path, "three")


def test_saes_that_do_not_fit_are_refused(tiny) -> None:
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=48))
    with pytest.raises(ValueError, match="names no site"):
        check_fits(sae, tiny)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    with pytest.raises(ValueError, match="reads 16 dimensions.*has 32"):
        check_fits(sae, tiny)
    sae.cfg.metadata.hook_name = "blocks.9.hook_resid_post"
    with pytest.raises(ValueError, match="unknown site"):
        check_fits(sae, tiny)
    sae.cfg.metadata.hook_name = "blocks.1.mlp.hook_post"  # another width is right where the site is not the residual stream
    assert check_fits(sae, tiny) == "blocks.1.mlp.hook_post"
    sae.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ValueError, match="fold it in first"):
        check_fits(sae, tiny)
    with pytest.raises(ValueError, match="got \\[-1\\]"):
        check_latents(sae, [0, -1])
