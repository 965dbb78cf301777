"""Reconstruction quality equals NumPy on unpadded rows, in the model's own units, and leaves the model as it was."""

import numpy as np
import pandas as pd
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from shared import EXAMPLES, SITES, perturb

from blockem_tl import Generation, Prompt, TrainingConfig, finetune, reconstruction_quality
from blockem_tl.data.chat import encode_examples, encode_rows
from blockem_tl.saes.fit import reconstruct
from blockem_tl.training.checkpoints import trajectory
from blockem_tl.views import plots

SITE = SITES[0]
CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2)
NUMBERS = ["mse", "variance", "normalised_mse", "explained_variance", "cosine"]


def new_sae(kind=StandardSAE, config=StandardSAEConfig, **settings) -> SAE:
    torch.manual_seed(0)
    sae = kind(config(d_in=32, d_sae=48, **settings))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.2)
    sae.cfg.metadata.hook_name = SITE
    return sae


@pytest.fixture
def sae() -> SAE:
    return new_sae()


def states(model, role: str) -> np.ndarray:
    """The activations of one role's tokens, row by row, unpadded."""
    found = []
    for row in encode_examples(model.tokenizer, EXAMPLES):
        span = {"system": slice(0, row.n_system), "prompt": slice(row.n_system, row.n_prompt), "reply": slice(row.n_prompt, None)}[role]
        found.append(model.run_with_cache(torch.tensor([row.ids]), names_filter=SITE)[1][SITE][0, span].detach().double().numpy())
    return np.concatenate(found)


def in_numpy(h: np.ndarray, sae: SAE) -> list[float]:
    """The docstring's formulas, with a ReLU SAE written out."""
    w_enc, w_dec, b_enc, b_dec = (getattr(sae, name).detach().double().numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec"))
    back = np.maximum((h - b_dec) @ w_enc + b_enc, 0) @ w_dec + b_dec
    mse, variance = ((h - back) ** 2).mean(), ((h - h.mean(0)) ** 2).mean()
    cosine = ((h * back).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(back, axis=-1)).mean()
    return [mse, variance, mse / variance, 1 - mse / variance, cosine]


def of(frame, **chosen):
    for column, value in chosen.items():
        frame = frame[frame[column] == value]
    return frame[NUMBERS].to_numpy()


def test_every_number_equals_a_numpy_restatement_in_each_arm_and_role(tiny, sae) -> None:
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned")
    found = reconstruction_quality(tiny, sae, EXAMPLES, adapters=["base", "tuned"], batch_size=5, progress=False).frame
    assert list(found["arm"].unique()) == ["base", "tuned"] and list(found["role"].unique()) == ["system", "prompt", "reply"]
    for role in ("system", "prompt", "reply"):
        tuned = states(tiny, role)
        with tiny.using("base"):
            base = states(tiny, role)
        np.testing.assert_allclose(of(found, arm="base", role=role)[0], in_numpy(base, sae), rtol=1e-4)
        np.testing.assert_allclose(of(found, arm="tuned", role=role)[0], in_numpy(tuned, sae), rtol=1e-4)
        assert set(found[found["role"] == role]["n_tokens"]) == {len(base)}
    assert np.abs(of(found, arm="base", role="reply") - of(found, arm="tuned", role="reply")).max() > 1e-3  # the arms differ
    assert found["epoch"][0] == 0 and found["epoch"].isna().sum() == 3


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm_rescale"])
def test_a_scaling_sae_reconstructs_in_the_models_units(tiny, kind) -> None:
    sae = new_sae(normalize_activations=kind)
    h = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8.0)[:, None] + 3
    if kind == "layer_norm":
        mean, scale = h.mean(-1, keepdim=True), h.std(-1, keepdim=True)
    else:
        mean, scale = 0.0, h.norm(dim=-1, keepdim=True) / 32**0.5
    plain = new_sae()
    expected = plain.decode(plain.encode((h - mean) / scale)) * scale + mean
    torch.testing.assert_close(reconstruct(sae, h), expected.detach(), rtol=1e-4, atol=1e-4)
    assert (reconstruct(plain, h) - expected).abs().max() > 1  # the twin: without the scaling it is another one
    before = reconstruction_quality(tiny, sae, EXAMPLES, progress=False).frame
    assert before.equals(reconstruction_quality(tiny, sae, EXAMPLES, progress=False).frame)  # nothing of a row stays in the SAE
    one_by_one = reconstruction_quality(tiny, sae, EXAMPLES, batch_size=1, progress=False).frame
    np.testing.assert_allclose(of(before), of(one_by_one), rtol=1e-4)


def test_a_topk_half_precision_or_splicing_sae_reconstructs_too(sae) -> None:
    h = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    top = new_sae(TopKSAE, TopKSAEConfig, k=4)
    acts = torch.relu((h - top.b_dec) @ top.W_enc + top.b_enc)
    kept = torch.where(acts >= acts.topk(4).values[:, -1:], acts, 0.0)
    torch.testing.assert_close(reconstruct(top, h), (kept @ top.W_dec + top.b_dec).detach())
    half = reconstruct(new_sae(dtype="bfloat16"), h)
    torch.testing.assert_close(half, reconstruct(sae, h), rtol=0.1, atol=0.1)
    assert half.dtype == torch.float32 and not torch.equal(half, reconstruct(sae, h))
    sae._use_error_term = True  # its forward would now give back h itself
    torch.testing.assert_close(sae(h), h)
    assert (reconstruct(sae, h) - h).abs().max() > 0.1


def test_checkpoints_of_a_run_are_read_in_order_and_the_model_stays_as_it_was(tiny, sae, tmp_path) -> None:
    tiny.add_adapter("mine", rank=4)
    perturb(tiny, "mine")
    tokens = torch.arange(7, 20)[None]
    run = finetune(tiny, EXAMPLES, config=CONFIG, adapter="run", checkpoints=tmp_path, save_every_epochs=0.4, progress=False)
    tiny.use_adapter("mine")
    logits, trainable = tiny(tokens), [n for n, p in tiny.hf.named_parameters() if p.requires_grad]
    found = reconstruction_quality(tiny, sae, EXAMPLES, adapters=["base", run.adapter], checkpoints=tmp_path, progress=False).frame
    assert list(found["epoch"].unique())[2:] == [pytest.approx(2 / 3, abs=1e-5), 1.0] and found["arm"].iloc[-1] == "epoch-1"
    np.testing.assert_allclose(of(found, arm="epoch-1"), of(found, arm="run"), rtol=1e-6)  # the last checkpoint is the run's adapter
    assert np.abs(of(found, arm="epoch-0.666667") - of(found, arm="run")).max() > 1e-5
    assert tiny.adapters == ["mine", "run"] and tiny.active_adapter == "mine" and torch.equal(tiny(tokens), logits)
    assert trainable == [n for n, p in tiny.hf.named_parameters() if p.requires_grad]
    listed = reconstruction_quality(tiny, sae, EXAMPLES, adapters=[], checkpoints=[tmp_path / "epoch-1"], progress=False).frame
    np.testing.assert_array_equal(of(listed), of(found, arm="epoch-1"))


def test_a_loaded_adapter_goes_again_even_after_an_error(tiny, tmp_path) -> None:
    tiny.add_adapter("one", rank=4)
    perturb(tiny, "one")
    tiny.save_adapter(tmp_path / "one")
    tiny.remove_adapter("one")
    tokens = torch.arange(7, 20)[None]
    base = tiny(tokens)
    with pytest.raises(KeyError), tiny.using(tmp_path / "one"):
        assert not torch.equal(tiny(tokens), base)
        raise KeyError
    assert tiny.adapters == [] and torch.equal(tiny(tokens), base)


def test_prompts_and_generated_replies_can_be_read(tiny, sae) -> None:
    prompts = [Prompt(id=e.id, text=e.prompt) for e in EXAMPLES[:3]]
    alone = reconstruction_quality(tiny, sae, prompts, progress=False).frame
    assert list(alone["role"]) == ["system", "prompt"]  # no reply, no row
    said = [Generation(prompt=p, condition="", reply="", reply_ids=(9, n), truncated=True) for p in prompts for n in (11, 12)]
    found = reconstruction_quality(tiny, sae, said, progress=False).frame
    assert int(found["n_tokens"].iloc[-1]) == 12
    rows = encode_rows(tiny.tokenizer, said)
    assert [row.ids[row.n_prompt :] for row in rows] == [(9, 11), (9, 12)] * 3
    np.testing.assert_allclose(of(found, role="prompt"), of(alone, role="prompt"), rtol=1e-4)  # causal: what follows changes nothing


def test_mistakes_are_refused_before_any_work(tiny, sae, tmp_path) -> None:
    for name, change in (("a", {}), ("b", {"seed": 1})):
        finetune(tiny, EXAMPLES, config=TrainingConfig(rank=4, batch_size=24, **change), checkpoints=tmp_path / name, progress=False)
        tiny.remove_adapter("default")
    a, b = (tmp_path / name / "epoch-1" for name in "ab")
    empty = Generation(prompt=Prompt(id="0", text="w1"), condition="", reply="", reply_ids=(), truncated=False)
    for options, message in (
        ({"checkpoints": [a, b]}, "another run.*config.seed: 0 there, 1 here"),
        ({"checkpoints": [a, tmp_path]}, "each with a run.json"),
        ({"checkpoints": tmp_path / "nowhere"}, "got none in"),
        ({"adapters": ["lost"]}, "unknown adapter 'lost'"),
        ({"adapters": []}, "expected adapters"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"rows": [EXAMPLES[0], Prompt(id="0", text="w1")]}, "rows of one kind"),
        ({"rows": []}, "at least one example"),
        ({"rows": [empty]}, "have no tokens"),
        ({"sae": new_sae(normalize_activations="expected_average_only_in")}, "fold it in first"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruction_quality(tiny, **{"sae": sae, "rows": EXAMPLES, "progress": False, **options})
    assert [epochs for epochs, _ in trajectory(a)] == [1.0] and tiny.adapters == []


def test_the_figure_has_a_line_for_each_run_and_for_base(tiny, sae, tmp_path) -> None:
    finetune(tiny, EXAMPLES, config=CONFIG, checkpoints=tmp_path, save_every_epochs=0.4, progress=False)
    frame = reconstruction_quality(tiny, sae, EXAMPLES, checkpoints=tmp_path, adapters=["base"], progress=False).frame
    twice = pd.concat([frame.assign(run="a"), frame.assign(run="b")])
    for shown, lines in ((frame, 2), (twice, 3)):
        axes = plots.reconstruction(shown).axes
        assert len(axes) == 6 and [len(panel.lines) for panel in axes] == [lines] * 6
    reply = frame[(frame["role"] == "reply") & (frame["arm"] != "base")]
    np.testing.assert_allclose(axes[5].lines[0].get_ydata(), reply["cosine"])
