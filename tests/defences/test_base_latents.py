"""Stored references equal live ones, are found by contents, caught when wrong, and never half written."""

from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import torch
from shared import EXAMPLES, SITES, perturb, sae_at, set_of

from blockem_tl import Blocking, TrainingConfig, finetune, load_model
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.defences import base_latents as references
from blockem_tl.defences.base_latents import BaseLatents, StoredLatents, read_latents, stored_latents


@pytest.fixture
def targets():
    saes = [sae_at(site, seed) for seed, site in enumerate(SITES)]
    return [(set_of(saes[0]), saes[0]), (set_of(saes[1], (1, 2, 40)), saes[1])]


@pytest.fixture
def rows(tiny):
    return encode_examples(tiny.tokenizer, EXAMPLES)


@pytest.fixture
def tuned(tiny):
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned", std=0.3)
    return tiny


@pytest.fixture
def forwards(monkeypatch):
    """Number of rows the reference was run on."""
    seen: list[int] = []

    def counted(model, targets, batch):
        seen.append(len(batch.ids))
        return read_latents(model, targets, batch)

    monkeypatch.setattr(references, "read_latents", counted)
    return seen


def gradient(model, blocking, rows, side="right") -> torch.Tensor:
    batch = pad(rows, model.pad_id, side=side)
    with blocking.during_step(model, batch) as penalty:
        value = penalty(model.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits).sum()
    found = torch.autograd.grad(value, model.adapter_parameters("tuned"), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("sites", [1, 2])
@pytest.mark.parametrize("positions", ["completion", "all"])
def test_stored_and_live_references_give_equal_gradients(tuned, targets, rows, tmp_path, sites, side, positions) -> None:
    live = Blocking(targets=targets[:sites], weight=1.0, reference="live", positions=positions)
    stored = replace(live, reference=BaseLatents(folder=tmp_path))
    stored.prepare(tuned, rows)
    shuffled = [rows[i] for i in (17, 3, 3, 22, 8)]  # other neighbours and another padding than when they were stored
    assert stored._run.stored is not None and stored._run.stored.look_up(pad(shuffled, 0, side=side)) is not None
    expected = gradient(tuned, live, shuffled, side)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient(tuned, stored, shuffled, side), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    stored._run.stored = StoredLatents(np.asarray(stored._run.stored.values) + 0.5, stored._run.stored.rows)  # the twin
    assert not torch.allclose(gradient(tuned, stored, shuffled, side), expected, rtol=1e-2)


def test_bfloat16_references_would_change_the_gradients(tuned, targets, rows, tmp_path) -> None:
    """They are kept in float32, because early in a run z - z_base is smaller than what rounding z_base to bf16 adds to it."""
    perturb(tuned, "tuned", std=0.003)
    live, stored = (Blocking(targets=targets, weight=1.0, reference=r) for r in ("live", BaseLatents(folder=tmp_path)))
    expected = gradient(tuned, live, rows)
    stored.prepare(tuned, rows)
    assert float((gradient(tuned, stored, rows) - expected).norm() / expected.norm()) < 1e-3
    kept = stored._run.stored
    rounded = torch.tensor(np.asarray(kept.values)).bfloat16().float().numpy()
    stored._run.stored = StoredLatents(rounded, kept.rows)
    assert float((gradient(tuned, stored, rows) - expected).norm() / expected.norm()) > 0.05


PRECISIONS = {"float32": (torch.float32, False), "autocast": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}


def run_in(tiny_folder, targets, precision: str, plant=lambda model: None) -> tuple[Blocking, list[dict[str, float]]]:
    dtype, autocast = PRECISIONS[precision]
    model, blocking = load_model(tiny_folder, dtype=dtype, device="cpu"), Blocking(targets=targets, weight=1.0)
    plant(model)
    config = TrainingConfig(batch_size=8, micro_batch_size=4, epochs=1.0, learning_rate=1e-2, bf16=autocast)
    return blocking, finetune(model, EXAMPLES, config=config, defences=[blocking], adapter="run", progress=False).history


@pytest.mark.filterwarnings("error:stored references")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_has_moved_before_the_first_step_in_any_precision(precision, tiny_folder, targets) -> None:
    """The default reference is stored, computed in the run's own precision: in bf16 base equals tuned to the last bit."""
    blocking, steps = run_in(tiny_folder, targets, precision)
    assert blocking._run.stored is not None
    assert 0 <= steps[0]["block"] <= (1e-8 if precision == "float32" else 0) * steps[-1]["block"] < steps[-1]["block"]
    rounded = torch.tensor(np.asarray(blocking._run.stored.values)).bfloat16().float().numpy()
    assert not np.array_equal(rounded, blocking._run.stored.values)  # what rounding it to bf16 would change


@pytest.mark.parametrize("precision", PRECISIONS)
def test_where_numbers_depend_on_the_batch_the_reference_runs_live(precision, tiny_folder, targets) -> None:
    def plant(model) -> None:
        model.add_hook("blocks.0.hook_resid_post", lambda activation, hook: activation * (1 + 0.01 * len(activation)))

    with pytest.warns(UserWarning, match=r"stored references differ from live ones by .*the reference runs live"):
        blocking, steps = run_in(tiny_folder, targets, precision, plant)
    assert blocking._run.stored is None and steps[0]["block"] == 0 < steps[-1]["block"]


def test_a_store_is_reused_and_a_changed_model_sae_latents_or_rows_get_their_own(tuned, targets, rows, tmp_path, forwards) -> None:
    where, folders = BaseLatents(folder=tmp_path), lambda: [p for p in tmp_path.iterdir() if p.is_dir()]
    stored_latents(tuned, targets, rows, where)
    assert sum(forwards) == len({row.ids for row in rows}) == 24
    forwards.clear()
    stored_latents(tuned, targets, list(reversed(rows)), where)  # another seed's order
    assert 0 < sum(forwards) < 8 and len(folders()) == 1  # the spot check alone
    other_sae = sae_at(SITES[1], seed=7)
    tuned.use_adapter("tuned")
    for changed_targets, changed_rows, changed in (
        (targets[:1], rows, lambda: None),
        ([targets[0], (set_of(other_sae, (1, 2, 40)), other_sae)], rows, lambda: None),
        ([targets[0], (set_of(targets[1][1], (1, 2, 41)), targets[1][1])], rows, lambda: None),
        (targets, rows[:-1], lambda: None),
        (targets, rows, lambda: tuned.original_model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)),
    ):
        before = len(folders())
        forwards.clear()
        changed()
        store = stored_latents(tuned, changed_targets, changed_rows, where)
        assert len(folders()) == before + 1 and sum(forwards) == len(changed_rows)
        batch = pad(rows[:5], 0, side="right")
        with tuned.using("base"):
            expected = read_latents(tuned, changed_targets, batch) * batch.mask[..., None]
        torch.testing.assert_close(store.look_up(batch), expected, rtol=1e-4, atol=1e-4)


def test_the_adapter_and_its_training_do_not_change_the_key(tiny, targets, rows, tmp_path) -> None:
    stored_latents(tiny, targets, rows, BaseLatents(folder=tmp_path))
    tiny.add_adapter("tuned")
    perturb(tiny, "tuned")
    stored_latents(tiny, targets, rows, BaseLatents(folder=tmp_path))
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1


@pytest.mark.parametrize("damage", ["flipped", "missing", "manifest"])
def test_a_damaged_store_is_caught_and_built_anew(tuned, targets, rows, tmp_path, damage) -> None:
    where = BaseLatents(folder=tmp_path)
    good = np.array(stored_latents(tuned, targets, rows, where).values)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    if damage == "flipped":
        values = np.load(folder / "values.npy")
        values[7, 2] += 1
        np.save(folder / "values.npy", values)
    else:
        (folder / ("values.npy" if damage == "missing" else "manifest.json")).unlink()
        (folder / "manifest.json").touch()
    with pytest.warns(UserWarning, match="changed after they were written|cannot be read"):
        again = stored_latents(tuned, targets, rows, where)
    assert np.array_equal(again.values, good)


def test_what_the_key_misses_the_spot_check_finds(tuned, targets, rows, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(type(tuned), "fingerprint", lambda self, adapter=None: "the same")
    where = BaseLatents(folder=tmp_path)
    stored_latents(tuned, targets, rows, where)
    stored_latents(tuned, targets, rows, where)  # nothing to warn of: pytest would fail on it below
    tuned.original_model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.warns(UserWarning, match="no longer agree with the model"):
        store = stored_latents(tuned, targets, rows, where)
    batch = pad(rows[:5], 0, side="right")
    with tuned.using("base"):
        torch.testing.assert_close(store.look_up(batch), read_latents(tuned, targets, batch) * batch.mask[..., None], rtol=1e-4, atol=1e-4)


def test_a_build_that_dies_leaves_nothing_and_rows_not_stored_are_not_found(tuned, targets, rows, tmp_path, monkeypatch) -> None:
    calls = count()

    def dying(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return read_latents(*args)

    with monkeypatch.context() as patched:
        patched.setattr(references, "read_latents", dying)
        with pytest.raises(KeyboardInterrupt):
            stored_latents(tuned, targets, rows, BaseLatents(folder=tmp_path), batch_size=8)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []
    store = stored_latents(tuned, targets, rows[1:], BaseLatents(folder=tmp_path))
    assert store.look_up(pad(rows[1:3], 0, side="right")) is not None
    assert store.look_up(pad(rows[:3], 0, side="right")) is None


def test_the_reference_may_be_an_adapter_held_or_saved_or_another_model(tuned, targets, rows, tiny_folder, tmp_path) -> None:
    other = load_model(tiny_folder, device="cpu")
    other.original_model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    tuned.add_adapter("start", rank=4)
    perturb(tuned, "start", std=0.3, seed=9)
    folder = tuned.save_adapter(tmp_path / "start", "start")
    tuned.use_adapter("tuned")
    found = {}
    for label, of in (("base", "base"), ("adapter", "start"), ("folder", folder), ("model", other)):
        for stored in (True, False):
            blocking = Blocking(targets=targets, weight=1.0, reference=BaseLatents(adapter_or_model=of, stored=stored))
            blocking.prepare(tuned, rows)
            found[label, stored] = (
                blocking.reference_latents(tuned, pad(rows[:4], 0, side="right")) * pad(rows[:4], 0, side="right").mask[..., None]
            )
        torch.testing.assert_close(found[label, True], found[label, False], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(found["folder", stored], found["adapter", stored]) for stored in (True, False))
    assert tuned.adapters == ["tuned", "start"] and tuned.active_adapter == "tuned"
    assert not torch.allclose(found["base", True], found["adapter", True], atol=1e-2)
    assert not torch.allclose(found["base", True], found["model", True], atol=1e-2)
    batch = pad(rows[:4], 0, side="right")
    tuned.use_adapter("start")
    torch.testing.assert_close(
        found["adapter", False],
        read_latents(tuned, targets, batch) * batch.mask[..., None],
    )
    with pytest.raises(ValueError, match="unknown adapter 'gone'"):
        Blocking(targets=targets, weight=1.0, reference=BaseLatents(adapter_or_model="gone")).prepare(tuned, rows)


def test_several_targets_sum_and_each_may_have_its_weight(tuned, targets, rows) -> None:
    batch = pad(rows[:6], 0, side="right")

    def penalty_of(blocking) -> torch.Tensor:
        with torch.no_grad(), blocking.during_step(tuned, batch) as penalty:
            return penalty(tuned.hf(input_ids=batch.ids, attention_mask=batch.mask.long()).logits)

    one, two = (penalty_of(Blocking(latent_set=latent_set, sae=sae, weight=5.0, reference="live")) for latent_set, sae in targets)
    both = Blocking(targets=targets, weight=5.0, reference="live")
    torch.testing.assert_close(penalty_of(both), one + two)
    torch.testing.assert_close(penalty_of(replace(both, weight=(2.0, 0.5))), 2 * one + 0.5 * two)
    assert not torch.allclose(one, two)
    numbers = both.metrics()
    per_site = [numbers[f"block/{site}+"] + numbers[f"block/{site}-"] for site in SITES]
    np.testing.assert_allclose(per_site, [float(one.mean()), float(two.mean())], rtol=1e-5)
    assert both.metrics() == {}
    plus = Blocking(targets=[(s.only(1), sae) for s, sae in targets], weight=1.0, reference="live")
    torch.testing.assert_close(penalty_of(plus).mean(), torch.tensor(numbers[f"block/{SITES[0]}+"] + numbers[f"block/{SITES[1]}+"]))


def test_bad_targets_are_refused(tuned, targets) -> None:
    (first, sae), second = targets
    for options, message in (
        ({}, "either latent_set"),
        ({"latent_set": first}, "either latent_set"),
        ({"latent_set": first, "sae": sae, "targets": targets}, "either latent_set"),
        ({"targets": [second, (first, sae)]}, "from the first block to the last"),
        ({"targets": [(first, sae), (first.first(1), sae)]}, "union"),
        ({"targets": targets, "weight": (1.0, 2.0, 3.0)}, "one weight, or one for each of 2 targets"),
        ({"targets": targets, "weight": (1.0, float("nan"))}, "finite"),
        ({"targets": [(first, second[1])]}, "another SAE"),
    ):
        with pytest.raises(ValueError, match=message):
            Blocking(**{"weight": 1.0, **options})


def test_a_penalty_without_gradient_is_refused_before_training(tiny, targets, rows) -> None:
    blocking = Blocking(targets=targets, weight=1.0)
    tiny.add_adapter("above", target_modules=["layers.3.mlp.up_proj"])
    with pytest.raises(ValueError, match="nothing that is trained lies below"):
        blocking.prepare(tiny, rows)
    tiny.add_adapter("below", target_modules=["layers.0.mlp.up_proj"])
    blocking.prepare(tiny, rows)
