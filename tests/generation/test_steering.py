"""Vectors that overflow and sites that are named twice are refused before anything is generated."""

import pytest
import torch
from shared import WIDTH

from blockem_tl import Condition, Prompt, Steering, generate, load_model
from blockem_tl.hooks import steer

SITE = "blocks.1.hook_resid_post"
ONES = torch.ones(WIDTH)


@pytest.mark.parametrize(
    ("dose", "scale", "direction"),
    [
        (1e38, 1e3, ONES),
        (-1e38, 1e3, ONES),
        (1e30, 1.0, ONES * 1e30),
        (float("inf"), 1.0, ONES),
        (0.0, float("inf"), ONES),
        (1.0, 1.0, ONES / 0),
        (float("nan"), 1.0, ONES),
    ],
)
def test_a_product_that_overflows_is_refused(dose, scale, direction) -> None:
    with pytest.raises(ValueError, match=f"steering at {SITE}"):
        Steering(site=SITE, direction=direction, dose=dose, scale=scale)
    with pytest.raises(ValueError, match=f"steer at {SITE}"):
        steer(SITE, direction, dose, scale=scale)
    assert torch.isfinite(Steering(site=SITE, direction=ONES, dose=1e30, scale=1e3).vector).all()


def test_a_vector_that_only_the_models_dtype_cannot_hold_is_refused(tiny_folder) -> None:
    strong = Condition(name="strong", steering=(Steering(site=SITE, direction=ONES, dose=1e4, scale=10.0),))
    half = load_model(tiny_folder, device="cpu", dtype=torch.float16, check="off")
    with pytest.raises(ValueError, match=r"condition 'strong': its vector at .* overflows torch.float16: lower the dose"):
        generate(half, [Prompt(id="1", text="w1")], conditions=[strong], max_new_tokens=2, progress=False)
    single = load_model(tiny_folder, device="cpu")
    assert len(generate(single, [Prompt(id="1", text="w1")], conditions=[strong], max_new_tokens=2, progress=False)) == 1


@pytest.mark.parametrize(
    "sites",
    [
        ("blocks.1.hook_out", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_in", "blocks.1.hook_resid_pre"),
        ("blocks.1.hook_out", "blocks.1.hook_out"),
    ],
)
def test_one_site_under_two_spellings_is_one_site(sites) -> None:
    one, two = (Steering(site=site, direction=ONES, dose=1.0) for site in sites)
    with pytest.raises(ValueError, match=r"expected each site once, under one of its spellings, got .*add the vectors instead"):
        Condition(name="both", steering=(one, two))
    others = (
        Steering(site="blocks.2.hook_out", direction=ONES, dose=1.0),
        Steering(site="blocks.1.hook_attn_out", direction=ONES, dose=1.0),
    )
    assert len(Condition(name="three", steering=(one, *others)).steering) == 3
