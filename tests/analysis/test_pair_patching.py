"""Patching by pairs equals one plain forward per answer, site and window; and the check can fail."""

import numpy as np
import pytest
import torch
from shared import perturb

from blockem_tl import Pair, load_model, patch, preference, record
from blockem_tl.analysis.patching.pairs import pair_patching
from blockem_tl.data.chat import encode_examples
from blockem_tl.evaluation.preference import sides

POST = [f"blocks.{n}.hook_resid_post" for n in range(4)]
PAIRS = [
    Pair(id=str(n), prompt=" ".join(f"w{(5 * n + i) % 57}" for i in range(n)), harmful=f"w{n} w3 w{n + 9}", helpful=f"w{n + 1} w8 w11 w2")
    for n in (1, 4, 2)
]


@pytest.fixture
def tuned(tiny):
    tiny.add_adapter("tuned")
    perturb(tiny, "tuned")
    return tiny


@torch.no_grad()
def alone(model, site, when, *, source="base", target="tuned", source_model=None) -> np.ndarray:
    """Margins of the pairs, each answer in a forward of its own with nothing shared."""
    found = []
    for row in encode_examples(model.tokenizer, sides(PAIRS)):
        ids, store = torch.tensor([row.ids]), {}
        where = torch.arange(ids.shape[1])[None] >= row.n_prompt
        other = source_model or model
        with other.using(source):
            other.run_with_hooks(ids, fwd_hooks=[record(site, store)])
        with model.using(target), model.hooks(fwd_hooks=[patch(site, store[site], where if when == "decode" else ~where)]):
            logits = model(ids)[0, row.n_prompt - 1 : -1]
        found.append(torch.log_softmax(logits, -1).gather(1, ids[0, row.n_prompt :, None]).mean().item())
    return np.array(found[: len(PAIRS)]) - np.array(found[len(PAIRS) :])


def test_every_site_and_window_equals_a_forward_of_its_own(tuned) -> None:
    sites = [*POST, "blocks.1.hook_attn_out", "blocks.2.hook_mlp_out"]
    found = pair_patching(tuned, PAIRS, sites, target="tuned", batch_size=4, progress=False)
    assert found.conditions == ("unpatched", *(f"{when}, {site}" for when in ("prompt", "decode") for site in sites))
    np.testing.assert_allclose(found.of("unpatched"), preference(tuned, PAIRS, adapter="tuned", progress=False).margins[0], atol=1e-5)
    for when in ("prompt", "decode"):
        for site in sites:
            np.testing.assert_allclose(found.of(f"{when}, {site}"), alone(tuned, site, when), atol=1e-5)
    assert np.abs(found.of(f"prompt, {POST[1]}") - alone(tuned, POST[1], "decode")).max() > 1e-3  # the check can fail
    assert np.abs(found.of(f"decode, {POST[1]}") - found.of("unpatched")).max() > 1e-3


def test_the_other_way_round_and_from_folders_and_models(tuned, tiny_folder, tmp_path) -> None:
    found = pair_patching(tuned, PAIRS, POST[1:2], when="decode", source="tuned", target="base", progress=False)
    np.testing.assert_allclose(found.of(f"decode, {POST[1]}"), alone(tuned, POST[1], "decode", source="tuned", target="base"), atol=1e-5)
    expected = pair_patching(tuned, PAIRS, POST[1:2], target="tuned", progress=False).margins
    folder = tuned.save_adapter(tmp_path / "saved", "tuned")
    base = load_model(tiny_folder, device="cpu")
    np.testing.assert_allclose(
        pair_patching(tuned, PAIRS, POST[1:2], source=base, target="tuned", progress=False).margins, expected, atol=1e-5
    )
    tuned.remove_adapter("tuned")
    np.testing.assert_allclose(pair_patching(tuned, PAIRS, POST[1:2], target=folder, progress=False).margins, expected, atol=1e-5)
    assert tuned.adapters == []


def test_what_cannot_be_patched_is_refused(tuned) -> None:
    for options, message in (
        ({"source": "tuned", "target": "tuned"}, "would change nothing"),
        ({"sites": ["blocks.9.hook_resid_post"], "target": "tuned"}, "lacks a site"),
        ({"sites": [], "target": "tuned"}, "at least one site"),
    ):
        with pytest.raises(ValueError, match=message):
            pair_patching.__wrapped__(tuned, PAIRS, progress=False, **options)
