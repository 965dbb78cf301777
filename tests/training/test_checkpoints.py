"""Interrupted and resumed equals uninterrupted to the last bit; another run's checkpoint is refused by name; the last good one stays."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from sae_lens import SAE
from shared import EXAMPLES, SITES, Interrupted, at_step, perturb, sae_at, set_of, weights

from blockem_tl import Blocking, KLToBase, LatentSet, TrainingConfig, finetune, load_model
from blockem_tl.defences.base_latents import BaseLatents
from blockem_tl.storage import files
from blockem_tl.training.defence import NoPenalty
from blockem_tl.training.identity import differences, identity_of

CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, micro_batch_size=4, learning_rate=1e-2, dropout=0.2, epochs=2, warmup_steps=1)


@pytest.fixture
def sae() -> SAE:
    return sae_at(SITES[0])


@pytest.fixture
def blocking(sae) -> Blocking:
    return Blocking(latent_set=set_of(sae), sae=sae, weight=3.0)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@pytest.mark.parametrize(("stop", "last"), [(4, "epoch-1"), (6, "epoch-1.66667"), (2, None)])
def test_interrupted_and_resumed_equals_uninterrupted_to_the_last_bit(tiny, blocking, tmp_path, schedule, stop, last) -> None:
    """3 steps per epoch: checkpoints after steps 2, 3, 5, 6. Dropout makes the result depend on the random states too."""
    config = replace(CONFIG, schedule=schedule)
    whole = finetune(tiny, EXAMPLES, config=config, defences=[blocking], adapter="whole", progress=False)
    options = {"config": config, "defences": [blocking], "adapter": "parts", "checkpoints": tmp_path, "progress": False}
    with pytest.raises(Interrupted):
        finetune(tiny, EXAMPLES, stop_when=at_step(stop), **options)
    assert tiny.adapters == ["whole"]
    assert names(tmp_path)[-1:] == ([last] if last else [])
    resumed = finetune(tiny, EXAMPLES, resume=True, **options)
    assert resumed.steps == whole.steps == 6 and resumed.history == whole.history
    assert torch.equal(weights(tiny, "parts"), weights(tiny, "whole"))
    assert names(tmp_path) == ["epoch-0.666667", "epoch-1", "epoch-1.66667", "epoch-2"]
    tiny.remove_adapter("parts")
    again = finetune(tiny, EXAMPLES, resume=True, **options)  # there is nothing left to do
    assert again.history == whole.history and torch.equal(weights(tiny, "parts"), weights(tiny, "whole"))


class Halves(NoPenalty):
    """A defence that halves the trained adapter's matrices."""

    name = "halves"

    def finish(self, model, adapter) -> None:
        for parameter in model.adapter_parameters(adapter):
            parameter.mul_(0.5)


def test_a_finished_run_that_is_resumed_is_finished_by_its_defences_too(tiny, tmp_path) -> None:
    options = {"config": CONFIG, "defences": [Halves()], "checkpoints": tmp_path, "progress": False}
    finetune(tiny, EXAMPLES, adapter="whole", **options)
    finetune(tiny, EXAMPLES, adapter="again", resume=True, **options)
    tiny.load_adapter(tmp_path / "epoch-2", "saved")  # a checkpoint is of the training, before they act
    assert torch.equal(weights(tiny, "whole"), weights(tiny, "again")) and torch.equal(weights(tiny, "saved") * 0.5, weights(tiny, "whole"))


@pytest.mark.parametrize("lost", ["optimizer", "generator"])
def test_the_twin_a_resume_without_moments_or_random_states_differs(tiny, tmp_path, monkeypatch, lost) -> None:
    finetune(tiny, EXAMPLES, config=CONFIG, adapter="whole", progress=False)
    with pytest.raises(Interrupted):
        finetune(tiny, EXAMPLES, config=CONFIG, adapter="parts", checkpoints=tmp_path, stop_when=at_step(4), progress=False)
    skipped = "restore_optimizer" if lost == "optimizer" else "restore_generators"
    monkeypatch.setattr(f"blockem_tl.training.loop.{skipped}", lambda *args: None)
    finetune(tiny, EXAMPLES, config=CONFIG, adapter="parts", checkpoints=tmp_path, resume=True, progress=False)
    assert not torch.equal(weights(tiny, "parts"), weights(tiny, "whole"))


def test_checkpoints_are_plain_adapters(tiny, tiny_folder, plain, tokens, tmp_path) -> None:
    from peft import PeftModel

    finetune(tiny, EXAMPLES, config=CONFIG, adapter="tuned", checkpoints=tmp_path, save_every_epochs=1, progress=False)
    assert names(tmp_path) == ["epoch-1", "epoch-2"]
    logits = {}
    for epoch in names(tmp_path):
        other = load_model(tiny_folder, tmp_path / epoch, device="cpu")
        plainly = PeftModel.from_pretrained(plain, str(tmp_path / epoch), adapter_name=epoch.replace("-", ""))
        plainly.set_adapter(epoch.replace("-", ""))
        with torch.no_grad():
            logits[epoch] = plainly.eval()(tokens).logits
            assert torch.equal(logits[epoch], other.hf(tokens).logits)
    with torch.no_grad():
        assert torch.equal(logits["epoch-2"], tiny.hf(tokens).logits)
    assert not torch.equal(logits["epoch-1"], logits["epoch-2"])
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in tmp_path.rglob("*"))


def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(tiny, blocking, sae, tmp_path) -> None:
    def run(model=tiny, examples=EXAMPLES, config=CONFIG, defences=(blocking,), **options):
        finetune(model, examples, config=config, defences=defences, adapter="t", checkpoints=tmp_path, progress=False, **options)

    run()
    tiny.remove_adapter("t")
    with pytest.raises(FileExistsError, match="holds checkpoints up to epoch-2: pass resume=True"):
        run()
    other = sae_at(SITES[0], seed=5)
    shuffled = replace(blocking.latent_set, signs=tuple(-s for s in blocking.latent_set.signs))
    for options, field in (
        ({"config": replace(CONFIG, learning_rate=2e-2)}, "config.learning_rate: 0.01 there, 0.02 here"),
        ({"config": replace(CONFIG, seed=1)}, "config.seed"),
        ({"examples": EXAMPLES[:-1]}, "rows:"),
        ({"defences": []}, "block.weight: 3.0 there, \\(nothing\\) here"),
        ({"defences": [replace(blocking, weight=4.0)]}, "block.weight: 3.0 there, 4.0 here"),
        ({"defences": [replace(blocking, latent_set=shuffled)]}, "block.latent_set.signs"),
        ({"defences": [Blocking(latent_set=set_of(other), sae=other, weight=3.0)]}, "block.sae"),
        ({"defences": [blocking, KLToBase(weight=1.0)]}, "kl.weight: \\(nothing\\) there"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint of another run: .*{field}"):
            run(resume=True, **options)
        assert tiny.adapters == []
    tiny.original_model.model.layers[0].mlp.up_proj.weight.data.mul_(2.0)
    with pytest.raises(ValueError, match="model and starting adapter"):
        run(resume=True)
    tiny.original_model.model.layers[0].mlp.up_proj.weight.data.div_(2.0)
    run(resume=True, config=replace(CONFIG, micro_batch_size=2))  # how a step is computed does not matter


def test_what_the_identity_is_made_of(tiny, blocking) -> None:
    tiny.add_adapter("t")
    first = identity_of(tiny, "t", [], CONFIG, [blocking])
    assert first == identity_of(tiny, "t", [], CONFIG, [blocking]) and differences(first, first) == []
    assert not any("_run" in name for name in first)
    changed = identity_of(tiny, "t", [], CONFIG, [replace(blocking, reference=BaseLatents(adapter_or_model="t"))])
    assert any(name.startswith("block.reference") for name in differences(first, changed))


class ExplodesAt(KLToBase):
    """A penalty that is infinite at one step."""

    def __init__(self, step: int) -> None:
        super().__init__(weight=1.0)
        object.__setattr__(self, "calls", 0)
        object.__setattr__(self, "step", step)

    @contextmanager
    def during_step(self, model, batch):
        object.__setattr__(self, "calls", self.calls + 1)
        yield lambda logits: logits.mean((1, 2)) * (float("inf") if self.calls == self.step else 0.0)


def test_a_loss_that_is_not_finite_names_step_rows_and_the_last_good_checkpoint(tiny, tmp_path) -> None:
    config = replace(CONFIG, micro_batch_size=None)
    with pytest.raises(FloatingPointError, match=r"at step 5 .*rows \['\d+'.*last good checkpoint is .*epoch-1\b") as error:
        finetune(tiny, EXAMPLES, config=config, defences=[ExplodesAt(5)], checkpoints=tmp_path, progress=False)
    named = {part for part in str(error.value).split("rows [")[1].split("]")[0].replace("'", "").split(", ")}
    assert len(named) == 8 and named < {example.id for example in EXAMPLES}
    assert names(tmp_path) == ["epoch-0.666667", "epoch-1"] and tiny.adapters == []
    assert torch.isfinite(weights_of(tiny, tmp_path / "epoch-1")).all()


def weights_of(model, folder) -> torch.Tensor:
    model.load_adapter(folder, "loaded")
    return weights(model, "loaded")


class InfiniteGradient(KLToBase):
    """A penalty of 0 whose gradient is not a number."""

    def __init__(self) -> None:
        super().__init__(weight=1.0)

    @contextmanager
    def during_step(self, model, batch):
        yield lambda logits: (logits.mean((1, 2)) * 0.0).sqrt()


def test_a_gradient_that_is_not_finite_stops_before_the_step(tiny, tmp_path) -> None:
    with pytest.raises(FloatingPointError, match="the gradient became nan at step 1"):
        finetune(tiny, EXAMPLES, config=CONFIG, defences=[InfiniteGradient()], checkpoints=tmp_path, progress=False)
    assert names(tmp_path) == [] and tiny.adapters == []


def test_a_write_that_dies_leaves_the_older_checkpoints_and_nothing_half(tiny, tmp_path, monkeypatch) -> None:
    written, write_json = [], files.write_json

    def dying(path, value):
        if path.name == "run.json":
            written.append(path)
            if len(written) == 2:
                raise OSError("disk full")
        return write_json(path, value)

    monkeypatch.setattr(files, "write_json", dying)
    with pytest.raises(OSError, match="disk full"):
        finetune(tiny, EXAMPLES, config=CONFIG, checkpoints=tmp_path, progress=False)
    assert names(tmp_path) == ["epoch-0.666667"]


def test_a_run_may_start_from_an_adapter_held_or_saved(tiny, blocking, tmp_path) -> None:
    finetune(tiny, EXAMPLES, config=CONFIG, adapter="first", progress=False)
    before = weights(tiny, "first").clone()
    tiny.save_adapter(tmp_path / "first", "first")
    anchored = replace(blocking, reference=BaseLatents(adapter_or_model="first"))
    on = {"config": CONFIG, "defences": [anchored], "progress": False}
    held = finetune(tiny, EXAMPLES, start="first", adapter="held", **on)
    finetune(tiny, EXAMPLES, start=tmp_path / "first", adapter="saved", **on)
    assert torch.equal(weights(tiny, "held"), weights(tiny, "saved")) and torch.equal(weights(tiny, "first"), before)
    assert not torch.equal(weights(tiny, "held"), before)
    assert held.history[0]["sft"] < finetune(tiny, EXAMPLES, adapter="fresh", **on).history[0]["sft"]
    quiet = {**on, "config": replace(CONFIG, dropout=0.0)}
    finetune(tiny, EXAMPLES, start="first", adapter="anchored", **quiet)
    perturb(tiny, "anchored")
    with pytest.raises(ValueError, match="unknown adapter 'nowhere'"):
        finetune(tiny, EXAMPLES, start="nowhere", adapter="x", **on)
    assert "x" not in tiny.adapters


def test_a_set_of_the_wrong_kind_is_refused(tiny, blocking) -> None:
    with pytest.raises(ValueError, match="different names"):
        finetune(tiny, EXAMPLES, defences=[blocking, replace(blocking, weight=1.0)], progress=False)
    with pytest.raises(ValueError, match="save_every_epochs"):
        finetune(tiny, EXAMPLES, checkpoints="unused", save_every_epochs=0, progress=False)
    assert tiny.adapters == [] and isinstance(blocking.latent_set, LatentSet)
