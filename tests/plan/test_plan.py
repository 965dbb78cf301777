"""What a run will take in memory: tensors without data go the way of real ones, and what is foretold follows batch, tokens and card."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from blockem_tl import TrainingConfig, cli, load_model
from blockem_tl.plan import skeleton, stages
from blockem_tl.plan.command import gigabytes
from blockem_tl.plan.estimate import plan_memory
from blockem_tl.plan.meter import Meter
from blockem_tl.presets import PRESETS

KB = 1024


def test_the_meter_counts_what_lives_and_what_lived() -> None:
    with Meter() as meter:
        kept = torch.zeros(64 * KB // 4)
        view = kept.view(2, -1)[1] + 0.0  # a view is nothing new, its copy is half as much
        assert meter.now == 96 * KB
        torch.zeros(256 * KB // 4)
        assert meter.now == 96 * KB and meter.peak == 352 * KB
        del view
        meter.restart()
        assert meter.now == meter.peak == 64 * KB
    assert kept.sum() == 0


def test_without_data_code_meets_what_a_healthy_run_would() -> None:
    with Meter(masked=0.25), torch.device("meta"):
        values = torch.ones(4, 8, 16)
        assert torch.isfinite(values).all() and not (values == 0).any() and float(values.sum()) == 1
        mask = torch.ones(4, 8, dtype=torch.bool)
        assert values[mask].shape == (8, 16) and values[:, mask[0]].shape == (4, 2, 16) and values[[0, 1]].shape == (2, 8, 16)


def step_of(model, *, rows: int, tokens: int, checkpointing: bool = False) -> int:
    sae = stages.plain_sae("blocks.2.hook_resid_post", 32, 256).to_empty(device=str(model.device))
    for parameter in sae.parameters():
        torch.nn.init.ones_(parameter)
    with Meter() as meter, stages.trainable(model, TrainingConfig(gradient_checkpointing=checkpointing)):
        batch = stages.rows_of(rows, tokens, model.device)
        return stages.peak_of(meter, lambda: stages.training_step(model, batch, sae, [1, 2], live=True))


def test_a_model_without_data_takes_what_the_real_one_takes(tiny_folder) -> None:
    real = load_model(tiny_folder, device="cpu")
    with Meter():
        bare = skeleton.skeleton(AutoConfig.from_pretrained(tiny_folder), dtype=torch.float32, context=96)
    taken = step_of(real, rows=4, tokens=48)
    assert step_of(bare, rows=4, tokens=48) == pytest.approx(taken, rel=0.02)
    assert step_of(bare, rows=8, tokens=48) > 1.8 * taken > 1.8 * step_of(bare, rows=4, tokens=48, checkpointing=True)
    assert real.adapters == bare.adapters == []


@pytest.mark.slow
def test_batches_halve_until_they_fit_and_a_small_card_is_said_to_be_too_small() -> None:
    training = replace(PRESETS["organism"].training, batch_size=64)  # whose work is well over what a process needs anyway
    preset = replace(PRESETS["organism"], model="organism", training=training)
    large, small = plan_memory(preset, gpu_gb=16, tokens=60), plan_memory(preset, gpu_gb=1.2, tokens=60)
    assert all(stage.fits for stage in large.stages) and large.stages[0].batch == preset.training.batch_size
    assert small.stages[0].batch < preset.training.batch_size and small.stages[0].total < 1.2
    assert small.stages[1].work < large.stages[0].work  # with gradient checkpointing
    none = plan_memory(preset, gpu_gb=1.05, tokens=60)
    assert not none.stages[0].fits and none.stages[0].batch == 1
    assert list(large.to_frame()["stage"]) == ["training", "training, gradient checkpointing", "losses", "replies"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.requires.gpu_gb])
def test_a_preset_needs_the_card_that_it_names(name: str) -> None:
    preset = PRESETS[name]
    named, smaller = (plan_memory(preset, gpu_gb=share * preset.requires.gpu_gb) for share in (1.0, 0.8))
    full = preset.training.micro_batch_size or preset.training.batch_size
    assert named.stages[0].fits and named.stages[0].batch == full
    assert smaller.stages[0].batch < full and smaller.stages[1].batch == full


def test_the_command_says_what_fits(capsys) -> None:
    cli.main(["plan", "organism", "--gpu", "8GB", "--tokens", "60"])
    said = capsys.readouterr().out
    assert "organism on 8 GB, rows of 60 tokens" in said and "gradient checkpointing" in said and "fits" in said


@pytest.mark.parametrize("text", ["", "GB", "80TB", "-3", "0"])
def test_cards_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected the card's memory as 80GB"):
        gigabytes(text)
    assert gigabytes("80GB") == gigabytes("80 GiB") == gigabytes("80") == 80


def test_numbers_and_models_that_cannot_be_planned_for_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, got 80 and 1"):
        plan_memory(PRESETS["organism"], tokens=1)
    with pytest.raises(ValueError, match="whose model's configuration can be had, got 'no/such'"):
        plan_memory(replace(PRESETS["organism"], model="no/such"))
