"""The monitor reports signed movement in spreads, raises its alarm once, and leaves training alone to the last bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from shared import perturb

from blockem_tl import Example, LatentSet, TrainingConfig, finetune
from blockem_tl.data.chat import encode_examples, pad
from blockem_tl.defences.monitor import Monitor, causal_weights
from blockem_tl.training.defence import Defence, Measures
from blockem_tl.types import Candidate

SITE, LATER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
EXAMPLES = [
    Example(id=str(i), prompt=" ".join(f"w{(3 * i + j) % 57}" for j in range(1 + i % 4)), completion=" ".join(f"w{(i + 7 * j) % 57}" for j in range(1 + i % 5)))
    for i in range(24)
]  # fmt: skip
ORDINARY = [Example(id=f"o{i}", prompt=f"w{i}", completion=f"w{2 * i} w{i + 3} w{i + 11}") for i in range(20)]
CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2)


def new_sae(site: str = SITE, seed: int = 0) -> SAE:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    for parameter in sae.parameters():
        parameter.data.normal_(std=0.3)
    sae.cfg.metadata.hook_name = site
    return sae


@pytest.fixture
def sae() -> SAE:
    return new_sae()


@pytest.fixture
def latent_set(sae) -> LatentSet:
    return LatentSet.of(sae, [Candidate(latent=k, shift=(-1.0) ** k) for k in (4, 9, 16, 21)], [0.9, 0.4, 0.2, -0.3])


@pytest.fixture
def monitor(latent_set, sae) -> Monitor:
    return Monitor(latent_sets=[latent_set], saes=[sae], rows=ORDINARY, threshold=99.0)


def weights(model, name):
    return torch.cat([p.detach().flatten() for p in model.adapter_parameters(name)])


def values(model, sae, latent_set, examples) -> np.ndarray:
    """z [tokens, n_latents] of the completion tokens, row by row, by the SAE's full encode."""
    found = []
    for row in encode_examples(model.tokenizer, examples):
        hidden = model.run_with_cache(torch.tensor([row.ids]), names_filter=SITE)[1][SITE][0]
        found.append(sae.encode(hidden)[row.n_prompt :, list(latent_set.latents)].detach().numpy())
    return np.concatenate(found)


def test_movement_equals_a_numpy_restatement(tiny, monitor, sae, latent_set) -> None:
    spread = values(tiny, sae, latent_set, ORDINARY).std(0, ddof=1)
    spread = np.maximum(spread, np.sort(spread[spread > 0])[(len(spread[spread > 0]) - 1) // 2])  # torch's median is the lower one
    monitor.check(tiny)
    np.testing.assert_allclose(monitor.spreads[SITE].numpy(), spread, rtol=1e-4)
    tiny.add_adapter("tuned", rank=4)
    perturb(tiny, "tuned", std=0.05)
    for part in (EXAMPLES[:4], EXAMPLES[4:6]):  # two micro-batches of one step
        batch = pad(encode_examples(tiny.tokenizer, part), tiny.pad_id, side="right")
        with monitor.during_step(tiny, batch) as penalty:
            tiny.hf(input_ids=batch.ids, attention_mask=batch.mask.long())
        assert penalty is None
    shown = monitor.metrics()
    theta = values(tiny, sae, latent_set, EXAMPLES[:6])
    with tiny.using("base"):
        base = values(tiny, sae, latent_set, EXAMPLES[:6])
    expected = np.array(latent_set.signs) * (theta - base).mean(0) / spread
    np.testing.assert_allclose([m.moved for m in monitor.trajectory], expected, rtol=1e-3, atol=1e-5)
    assert [m.latent for m in monitor.trajectory] == list(latent_set.latents)
    weighted = (np.array([0.9, 0.4, 0.2, 0.0]) * expected).sum() / 1.5  # a latent that made things better counts for nothing
    assert shown[f"monitor/{SITE}"] == pytest.approx(weighted, rel=1e-3) != pytest.approx(expected.mean(), rel=1e-1)
    assert np.abs(expected).max() > 0.01


def test_latents_without_positive_scores_count_equally(latent_set) -> None:
    assert causal_weights(replace(latent_set, scores=(0.0, 0.0, -1.0, 0.0))).tolist() == [0.25] * 4
    assert causal_weights(latent_set).tolist() == pytest.approx([0.6, 0.4 / 1.5, 0.2 / 1.5, 0.0])


def test_a_watched_run_is_the_unwatched_run_to_the_last_bit(tiny, monitor) -> None:
    config = replace(CONFIG, dropout=0.2, micro_batch_size=4)  # dropout: watching must not draw random numbers either
    plain = finetune(tiny, EXAMPLES, config=config, adapter="plain", progress=False)
    watched = finetune(tiny, EXAMPLES, config=config, defences=[monitor], adapter="watched", progress=False)
    assert torch.equal(weights(tiny, "plain"), weights(tiny, "watched"))
    assert [row["loss"] for row in plain.history] == [row["loss"] for row in watched.history]
    finetune(tiny, EXAMPLES, config=replace(config, seed=1), adapter="other", progress=False)
    assert not torch.equal(weights(tiny, "plain"), weights(tiny, "other"))
    assert isinstance(monitor, Defence) and isinstance(monitor, Measures)


def test_every_step_or_every_second_one_is_measured(tiny, monitor) -> None:
    run = finetune(tiny, EXAMPLES, config=CONFIG, defences=[monitor], adapter="first", progress=False)
    assert sorted({m.step for m in monitor.trajectory}) == [1, 2, 3] and len(monitor.to_frame()) == 3 * 4
    assert all(abs(m.moved) < 1e-4 for m in monitor.trajectory if m.step == 1) and any(abs(m.moved) > 1e-3 for m in monitor.trajectory)
    last = monitor.to_frame().query("step == 3")["moved"]
    assert run.history[2][f"monitor/{SITE}"] == pytest.approx(float((last * causal_weights(monitor.latent_sets[0]).numpy()).sum()))
    monitor.every = 2
    run = finetune(tiny, EXAMPLES, config=CONFIG, defences=[monitor], adapter="second", progress=False)
    assert sorted({m.step for m in monitor.trajectory}) == [1, 3]  # and the first run's trajectory is gone
    assert [f"monitor/{SITE}" in row for row in run.history] == [True, False, True]


def test_the_alarm_goes_off_once_at_the_first_step_beyond_the_threshold_and_may_stop_the_run(tiny, monitor) -> None:
    config = replace(CONFIG, epochs=4)
    run = finetune(tiny, EXAMPLES, config=config, defences=[monitor], adapter="look", progress=False)
    moved = {int(row["step"]): row[f"monitor/{SITE}"] for row in run.history}
    first = next(step for step in moved if step > 3 and moved[step] > max(0.01, *(moved[s] for s in range(1, step))))
    monitor.threshold, heard = moved[first] * 0.99, []
    monitor.on_alarm = heard.append
    run = finetune(tiny, EXAMPLES, config=config, defences=[monitor], adapter="stop", stop_when=monitor.stop_when, progress=False)
    assert heard == [monitor.alarm] and monitor.alarm.step == run.steps == first
    assert (
        monitor.alarm.moved == pytest.approx(moved[first])
        and monitor.alarm.latent in monitor.latent_sets[0].latents
        and run.history[-1]["monitor/alarm"] == 1.0
    )
    monitor.threshold = max(moved.values()) * 2
    run = finetune(tiny, EXAMPLES, config=config, defences=[monitor], adapter="quiet", stop_when=monitor.stop_when, progress=False)
    assert monitor.alarm is None and len(heard) == 1 and run.steps == 12 and run.history[-1]["monitor/alarm"] == 0.0


def test_several_sites_are_watched_together(tiny, latent_set, sae) -> None:
    other = new_sae(LATER, seed=2)
    later = LatentSet.of(other, [Candidate(latent=k, shift=1.0) for k in (1, 2)], [0.0] * 2)
    monitor = Monitor(latent_sets=[latent_set, later], saes=[sae, other], rows=ORDINARY, threshold=9.0)
    run = finetune(tiny, EXAMPLES, config=CONFIG, defences=[monitor], adapter="first", progress=False)
    assert {f"monitor/{SITE}", f"monitor/{LATER}"} <= run.history[0].keys()
    assert monitor.to_frame().groupby("site")["latent"].nunique().to_dict() == {SITE: 4, LATER: 2}


def test_mistakes_are_refused_before_training(tiny, latent_set, sae) -> None:
    good = {"latent_sets": [latent_set], "saes": [sae], "rows": ORDINARY, "threshold": 1.0}
    for change, message in (
        ({"saes": []}, "an SAE for each"),
        ({"latent_sets": [], "saes": []}, "an SAE for each"),
        ({"threshold": 0.0}, "threshold > 0"),
        ({"threshold": float("nan")}, "threshold > 0"),
        ({"every": 0}, "every >= 1"),
        ({"rows": []}, "got none"),
        ({"saes": [new_sae(seed=3)]}, "another SAE"),
        ({"latent_sets": [latent_set] * 2, "saes": [sae] * 2}, "one latent set per site"),
    ):
        with pytest.raises(ValueError, match=message):
            Monitor(**{**good, **change})
    far = new_sae("blocks.9.hook_resid_post")
    lost = LatentSet.of(far, [Candidate(latent=1, shift=1.0)], [0.0])
    with pytest.raises(ValueError, match="unknown site"):
        finetune(
            tiny,
            EXAMPLES,
            config=CONFIG,
            defences=[Monitor(**{**good, "latent_sets": [lost], "saes": [far]})],
            progress=False,
        )
    sae.b_enc.data[list(latent_set.latents)] = -1e6  # latents that never fire
    silent = replace(latent_set, sae_fingerprint=LatentSet.of(sae, [Candidate(latent=1, shift=1.0)], [0.0]).sae_fingerprint)
    with pytest.raises(ValueError, match="varies on the rows"):
        finetune(tiny, EXAMPLES, config=CONFIG, defences=[Monitor(**{**good, "latent_sets": [silent]})], progress=False)
    assert tiny.adapters == []


def test_an_alarm_that_cannot_go_off_is_refused_where_it_is_waited_for(tiny, latent_set, sae) -> None:
    common = {"latent_sets": [latent_set], "saes": [sae], "rows": ORDINARY}
    watching = Monitor(**common)  # to calibrate
    with pytest.raises(ValueError, match="expected a threshold to stop by"):
        watching.stop_when(tiny, 1)
    with pytest.raises(ValueError, match="expected a threshold beside on_alarm"):
        Monitor(**common, on_alarm=print)
    assert not Monitor(**common, threshold=1.0, on_alarm=print).stop_when(tiny, 1)
