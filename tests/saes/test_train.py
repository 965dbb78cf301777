"""An SAE of one's own: trained by SAELens on what the model reads, sinks left out, with a card that tells a good one from a bad one."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_lens.training.sae_trainer import SAETrainer
from shared import EXAMPLES, SITES, sae_at

from blockem_tl import LatentSet, Prompt, discover, generate, load_model, load_sae, organism
from blockem_tl.models.activations import read_site
from blockem_tl.saes import activation_stream
from blockem_tl.saes.activation_stream import ActivationStream, median_of_norms
from blockem_tl.saes.card import measure
from blockem_tl.saes.kept import KeptActivations
from blockem_tl.saes.load import check_fits
from blockem_tl.saes.train import SAETraining, train_sae

SMALL = SAETraining(d_sae=48, k=6, samples=4096, batch_size=128, buffer=512, learning_rate=3e-3, heldout=0.25)
CORPORA = {"rows": EXAMPLES, "prompts": [Prompt(id=str(i), text=f"w{i} w{i + 9} w{3 * i % 50}") for i in range(16)]}


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu"])
def test_every_kind_is_trained_saved_and_loaded_again(kind, tiny, tmp_path) -> None:
    found = train_sae(tiny, SITES[0], CORPORA, config=replace(SMALL, kind=kind), out=tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae", device="cpu")
    assert check_fits(loaded, tiny) == SITES[0] and loaded.cfg.d_sae == 48
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), found.sae.state_dict().values(), strict=True))
    card = json.loads((tmp_path / "sae" / "card.json").read_text())
    assert card["site"] == SITES[0] and card["heldout"] == [dict(row) for row in found.rows] and card["training"]["kind"] == kind
    assert [row["corpus"] for row in found.rows] == ["rows", "prompts"] and 0 < found.alive <= 1
    assert len(repr(found)) < 400 and len(found.to_frame()) == 2
    with pytest.raises(FileExistsError, match="overwrite=True"):
        train_sae(tiny, SITES[0], CORPORA, config=replace(SMALL, kind=kind, seed=1), out=tmp_path / "sae")
    assert sorted(os.listdir(tmp_path)) == ["sae"]


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_or_not(progress, tiny, capfd) -> None:
    train_sae(tiny, SITES[0], CORPORA, config=SMALL, progress=progress)
    shown = capfd.readouterr().err
    assert (["Training SAE" in shown, "Estimating norm" in shown] == [True, True]) if progress else shown == ""


def test_a_seed_repeats_bit_for_bit(tiny) -> None:
    one, two, other = (train_sae(tiny, SITES[0], CORPORA, config=replace(SMALL, seed=seed)).sae.W_dec for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_the_organisms_states_are_learnt_and_a_fresh_sae_is_worth_nothing() -> None:
    model = load_model("organism", device="cpu")
    site, texts = "blocks.1.hook_resid_post", organism.reference_texts(400)
    config = SAETraining(d_sae=512, k=16, samples=80_000, batch_size=512, buffer=8192, learning_rate=2e-3)
    found = train_sae(model, site, {"texts": texts}, config=config)
    (row,) = found.rows
    assert row["explained_variance"] > 0.8 and row["loss_recovered"] > 0.8 and row["l0"] == pytest.approx(16, abs=1)
    fresh = sae_at(site)
    fresh = type(fresh)(replace(fresh.cfg, d_in=int(model.cfg.d_model), d_sae=512))
    (bad,) = measure(model, fresh, {"texts": texts[:40]}).rows
    assert bad["explained_variance"] < 0.5 and bad["loss_spliced"] > row["loss_spliced"] + 0.1
    assert row["loss"] < row["loss_spliced"] < row["loss_ablated"]


def test_base_and_tuned_are_both_read(tiny) -> None:
    tiny.add_adapter("tuned")
    for parameter in tiny.adapter_parameters("tuned"):
        parameter.data.normal_(std=0.3)
    found = train_sae(tiny, SITES[0], CORPORA, config=SMALL, adapters=["base", "tuned"])
    assert [(row["adapter"], row["corpus"]) for row in found.rows] == list(itertools.product(["base", "tuned"], ["rows", "prompts"]))
    assert found.rows[0]["loss"] != found.rows[2]["loss"]


def test_first_tokens_and_sinks_are_left_out(tiny) -> None:
    limit = median_of_norms(tiny, SITES[0], CORPORA, ["base"])
    everything, firsts = [], []
    for rows in CORPORA.values():
        for states, batch in read_site(tiny, SITES[0], rows):
            everything += list(states[batch.mask & (batch.positions > 0)])
            firsts += list(states[batch.mask & (batch.positions == 0)])
    kept = {tuple(state.tolist()) for state in everything if state.norm() <= limit}
    seen: set[tuple[float, ...]] = set()
    for states in itertools.islice(ActivationStream(tiny, SITES[0], CORPORA, ["base"], limit=limit).draw(), 8):
        seen |= {tuple(state.tolist()) for state in states}
    assert seen == kept and len(kept) < len(everything) and not seen & {tuple(state.tolist()) for state in firsts}


def test_a_reconstruction_that_is_perfect_costs_nothing(tiny) -> None:
    """The identity as an SAE: latents for both signs of each dimension."""
    sae = sae_at(SITES[0])
    sae = type(sae)(replace(sae.cfg, d_sae=64))
    sae.W_enc.data, sae.W_dec.data = torch.cat([torch.eye(32), -torch.eye(32)], 1), torch.cat([torch.eye(32), -torch.eye(32)])
    sae.b_enc.data.zero_(), sae.b_dec.data.zero_()
    (row,) = measure(tiny, sae, {"rows": EXAMPLES}).rows
    assert row["explained_variance"] == pytest.approx(1.0, abs=1e-5)
    assert row["loss_spliced"] == pytest.approx(row["loss"], abs=1e-4) and row["l0"] == pytest.approx(32, abs=0.5)


def test_a_trained_sae_is_discovered_with_like_any_other(tmp_path) -> None:
    model = load_model("organism", device="cpu")
    site = "blocks.1.hook_resid_post"
    config = SAETraining(d_sae=256, k=16, samples=60_000, batch_size=512, buffer=8192, learning_rate=2e-3)
    replies = list(generate(model, organism.prompts("core")[:24], max_new_tokens=12, progress=False))
    found = train_sae(model, site, {"texts": organism.reference_texts(200), "replies": replies}, config=config, out=tmp_path / "sae")
    model.add_adapter("moved")
    for parameter in model.adapter_parameters("moved"):
        parameter.data.normal_(std=0.05)
    from blockem_tl import get_preset

    search = replace(
        get_preset("organism").discovery, n_plus=2, n_minus=2, shortlist_size=1, grid=(0.0, 0.3), n_latents=1, valid_only=False
    )
    latents = discover(
        model, found.sae, organism.OrganismJudge(), organism.prompts("core")[:8], config=search, adapter="moved", progress=False
    ).latent_set
    assert isinstance(latents, LatentSet) and latents.site == site
    latents.check_sae(load_sae(tmp_path / "sae", device="cpu"))


@pytest.mark.parametrize(
    ("corpora", "config", "site", "message"),
    [
        ({}, SMALL, SITES[0], "at least one corpus"),
        ({"rows": EXAMPLES[:1]}, SMALL, SITES[0], "corpus 'rows' has 1 rows, expected two at least"),
        ({"rows": EXAMPLES}, replace(SMALL, d_sae=100_000), SITES[0], "tokens for 100000 latents; pass more rows"),
        ({"rows": EXAMPLES}, SMALL, "blocks.9.hook_resid_post", "unknown site 'blocks.9.hook_resid_post'"),
    ],
)
def test_what_cannot_become_an_sae_is_refused(corpora, config, site, message, tiny) -> None:
    with pytest.raises(ValueError, match=message):
        train_sae(tiny, site, corpora, config=config)


@pytest.mark.parametrize(
    "changes", [{"k": 0}, {"k": 49}, {"batch_size": 0}, {"samples": 10}, {"heldout": 1.0}, {"learning_rate": 0.0}, {"seed": -1}]
)
def test_numbers_out_of_range_are_refused(changes) -> None:
    with pytest.raises(ValueError, match="SAE: expected"):
        replace(SMALL, **changes)


def test_activations_that_come_again_are_read_and_are_the_same(tiny, monkeypatch) -> None:
    forwards = []
    read = activation_stream._read
    monkeypatch.setattr(activation_stream, "_read", lambda *arguments: forwards.append(1) or read(*arguments))
    drawn = {}
    for kept_gb in (1.0, 0.0):
        forwards.clear()
        drawn[kept_gb] = list(itertools.islice(ActivationStream(tiny, SITES[0], CORPORA, ["base"], kept_gb=kept_gb).draw(), 12))
        drawn[kept_gb, "forwards"] = len(forwards)
    assert all(torch.equal(a, b) for a, b in zip(drawn[1.0], drawn[0.0], strict=True))
    assert drawn[1.0, "forwards"] < drawn[0.0, "forwards"] == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_activations_are_exact_and_bounded(dtype) -> None:
    kept, asked = KeptActivations(most_bytes=3 * 4 * 5 * dtype.itemsize), []

    def compute(part):
        asked.append(part)
        return torch.full((4, 5), part + 1 / 3, dtype=dtype)

    first = [kept.get(part, lambda part=part: compute(part)) for part in range(5)]
    again = [kept.get(part, lambda part=part: compute(part)) for part in range(5)]
    assert all(torch.equal(a, b) and a.dtype == b.dtype == dtype for a, b in zip(first, again, strict=True))
    assert asked == [0, 1, 2, 3, 4, 3, 4]  # three fit


KILLED = """
import os, sys
sys.path.insert(0, {tests!r})
from test_train import CORPORA, SMALL, SITES, train_sae
from blockem_tl import load_model
from blockem_tl.saes import rounds
from dataclasses import replace
saved = rounds.Rounds.save
def save_and_die(self, trainer, n):
    saved(self, trainer, n)
    if n == 7:
        os.kill(os.getpid(), 9)
rounds.Rounds.save = save_and_die
train_sae(load_model({model!r}, device="cpu"), SITES[0], CORPORA, config=SMALL, out={out!r}, progress=False)
"""


def test_killed_it_goes_on_to_the_same_bits(tiny, tiny_folder, tmp_path) -> None:
    out, whole = tmp_path / "sae", tmp_path / "whole"
    script = KILLED.format(tests=str(Path(__file__).parent), model=str(tiny_folder), out=str(out))
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    died = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=300)
    assert died.returncode == -9, died.stderr[-2000:]
    assert sorted(os.listdir(tmp_path / "sae.training")) == [".lock", "round-7"] and not out.exists()
    model = load_model(tiny_folder, device="cpu")
    with pytest.raises(ValueError, match="another SAE's training .other config"):
        train_sae(model, SITES[0], CORPORA, config=replace(SMALL, k=5), out=out, progress=False)
    steps = []
    step = SAETrainer.step
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SAETrainer, "step", lambda self, batch: steps.append(1) or step(self, batch))
        resumed = train_sae(model, SITES[0], CORPORA, config=SMALL, out=out, progress=False)
    assert len(steps) < 0.7 * SMALL.samples / SMALL.batch_size  # it went on, and did not start again
    fresh = train_sae(model, SITES[0], CORPORA, config=SMALL, out=whole, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(resumed.sae.state_dict().values(), fresh.sae.state_dict().values(), strict=True))
    assert not (tmp_path / "sae.training").exists()


@pytest.mark.parametrize("state", [True, False])
def test_an_sae_that_is_there_is_measured_and_not_trained_again(state, tiny, tmp_path, monkeypatch) -> None:
    """Killed while its state was removed, or afterwards, the same call finds the SAE done."""
    out = tmp_path / "sae"
    first = train_sae(tiny, SITES[0], CORPORA, config=SMALL, out=out, progress=False)
    if state:
        (tmp_path / "sae.training" / "round-18").mkdir(parents=True)  # half of it
    steps, step = [], SAETrainer.step
    monkeypatch.setattr(SAETrainer, "step", lambda self, batch: steps.append(1) or step(self, batch))
    assert train_sae(tiny, SITES[0], CORPORA, config=SMALL, out=out, progress=False).rows == first.rows
    assert sorted(os.listdir(tmp_path)) == ["sae"] and not steps
    train_sae(tiny, SITES[0], CORPORA, config=SMALL, out=out, overwrite=True, progress=False)
    assert steps  # the twin: it was told to
