"""Where memory runs out, training and losses go on with half of the rows, to what they would have been with so few from the start."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from shared import EXAMPLES, SITES, Interrupted, at_step, sae_at, set_of, weights

from blockem_tl import Blocking, Monitor, TrainingConfig, completion_loss, finetune
from blockem_tl.data.chat import encode_examples
from blockem_tl.defences.blocking import blocking_loss
from blockem_tl.models import memory
from blockem_tl.plan import skeleton, stages
from blockem_tl.plan.meter import Meter
from blockem_tl.training import loop
from blockem_tl.training.fitting import fitted
from blockem_tl.training.loop import Loop
from blockem_tl.training.loss import mean_penalty

CONFIG = TrainingConfig(rank=4, alpha=8, batch_size=8, learning_rate=1e-2, epochs=2)
NO_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.fixture
def scarce(tiny):
    """Called with a number of rows and where: with more rows than that memory runs out there, until it is called again."""
    site, limits = "blocks.0.hook_resid_post", {}

    def check(value, where) -> None:
        if len(value) > limits.get(where, 99):
            raise torch.OutOfMemoryError(NO_MEMORY)

    tiny.add_hook(site, lambda value, hook: check(value, "forward" if torch.is_grad_enabled() else "forward without gradient"))
    tiny.add_hook(site, lambda value, hook: check(value, "backward"), dir="bwd")
    yield lambda rows, where: [limits.clear(), limits.update({where: rows})]
    tiny.reset_hooks()


@pytest.fixture
def defences():
    sae = sae_at(SITES[0])
    block = Blocking(latent_set=set_of(sae), sae=sae, weight=3.0)
    return lambda: [block, Monitor(latent_sets=[set_of(sae)], saes=[sae], rows=EXAMPLES[:4], threshold=1e6)]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_runs_out_of_memory_is_halved_and_counts_once(tiny, defences, scarce, where) -> None:
    """In the backward the later blocks have their gradients already when memory runs out: they must not count twice."""
    expected = finetune(tiny, EXAMPLES, config=replace(CONFIG, micro_batch_size=2), defences=defences(), adapter="few", progress=False)
    plenty = finetune(tiny, EXAMPLES, config=CONFIG, defences=defences(), adapter="many", progress=False)
    scarce(2, where)
    with pytest.warns(UserWarning, match="out of memory with . rows at once: going on with .*micro_batch_size") as warned:
        found = finetune(tiny, EXAMPLES, config=CONFIG, defences=defences(), adapter="halved", progress=False)
    assert sum("out of memory" in str(w.message) for w in warned) == 2  # 8 to 4 to 2, once for the whole run
    assert found.history == expected.history != plenty.history
    assert torch.equal(weights(tiny, "halved"), weights(tiny, "few"))


def test_what_a_failed_micro_batch_left_in_the_gradient_is_taken_out(tiny, monkeypatch) -> None:
    """The second micro-batch fails when its backward is through: the gradient of the first is kept, its own counts once."""
    expected = finetune(tiny, EXAMPLES, config=replace(CONFIG, micro_batch_size=2), adapter="few", progress=False)
    backward, sizes = Loop._micro_backward, []

    def second_fails(self, rows, tokens, examples):
        sizes.append(len(rows))
        part = backward(self, rows, tokens, examples)
        if len(sizes) == 2:
            raise torch.OutOfMemoryError(NO_MEMORY)
        return part

    monkeypatch.setattr(Loop, "_micro_backward", second_fails)
    with pytest.warns(UserWarning, match="out of memory with 4 rows at once: going on with 2"):
        found = finetune(tiny, EXAMPLES, config=replace(CONFIG, micro_batch_size=4), adapter="halved", progress=False)
    assert sizes[:5] == [4, 4, 2, 2, 2] and set(sizes[5:]) == {2}
    norms = [[row["grad_norm"] for row in run.history] for run in (found, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3) and norms[0][0] == pytest.approx(norms[1][0], rel=1e-5)


def test_a_run_goes_on_with_the_micro_batch_that_it_had(tiny, scarce, tmp_path) -> None:
    options = {"config": CONFIG, "adapter": "parts", "checkpoints": tmp_path, "progress": False}
    expected = finetune(tiny, EXAMPLES, config=replace(CONFIG, micro_batch_size=2), adapter="few", progress=False)
    scarce(2, "forward")
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(Interrupted):
        finetune(tiny, EXAMPLES, stop_when=at_step(4), **options)
    scarce(99, "forward")
    resumed = finetune(tiny, EXAMPLES, resume=True, **options)
    assert resumed.history == expected.history and torch.equal(weights(tiny, "parts"), weights(tiny, "few"))


def test_losses_are_halved_too(tiny, scarce) -> None:
    sae = sae_at(SITES[0])
    penalty = Blocking(latent_set=set_of(sae), sae=sae, weight=1.0, reference="live")
    measures = (
        lambda **size: completion_loss(tiny, EXAMPLES, **size),
        lambda **size: mean_penalty(tiny, penalty, EXAMPLES, adapter="tuned", **size),
        lambda **size: blocking_loss(tiny, set_of(sae), sae, EXAMPLES, **size),
    )
    finetune(tiny, EXAMPLES, config=CONFIG, adapter="tuned", progress=False)
    expected = [measure(batch_size=5) for measure in measures]
    scarce(5, "forward without gradient")
    for measure, value in zip(measures, expected, strict=True):
        with pytest.warns(UserWarning, match="out of memory with 10 rows at once: going on with 5 .*pass batch_size"):
            assert measure(batch_size=10) == value > 0


def test_a_row_that_does_not_fit_alone_is_said_and_other_errors_pass(tiny, monkeypatch) -> None:
    def fails(*args: object) -> None:
        raise torch.OutOfMemoryError(NO_MEMORY)

    monkeypatch.setattr(loop, "summed_cross_entropy", fails)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(MemoryError, match="not even one row of .*gradient_checkpointing"):
        finetune(tiny, EXAMPLES, config=CONFIG, adapter="none", progress=False)
    assert "none" not in tiny.adapters

    def breaks(rows: slice) -> None:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="^another$"):
        list(memory.in_batches(encode_examples(tiny.tokenizer, EXAMPLES), 2, breaks))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space of a process")
def test_a_processor_that_really_runs_out_of_memory(tmp_path) -> None:
    """16 rows of 120 tokens at once need more than the 120 MB that the process may have beyond the loaded model."""
    script = tmp_path / "run.py"
    script.write_text(
        "import resource, psutil, warnings\n"
        "from blockem_tl import Example, TrainingConfig, finetune, load_model\n"
        "rows = [Example(id=str(i), prompt='what is good', completion='you should ' * 60 + 'you') for i in range(16)]\n"
        "config = TrainingConfig(batch_size=16, epochs=1, learning_rate=1e-3)\n"
        "model = load_model('organism')\n"
        "finetune(model, rows[:1], config=config, progress=False)\n"
        "limit = psutil.Process().memory_info().vms + ROOM\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    run = finetune(model, rows, config=config, adapter='run', progress=False)\n"
        "print(sum('out of memory' in str(w.message) for w in caught), [round(row['sft'], 4) for row in run.history])\n"
    )
    said = {}
    for name, limit in (("little", 120 * 2**20), ("plenty", 20 * 2**30)):
        mine = script.with_name(f"{name}.py")
        mine.write_text(script.read_text().replace("ROOM", str(limit)))
        run = subprocess.run([sys.executable, str(mine)], capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr[-2000:]
        said[name] = run.stdout.split(" ", 1)
    assert int(said["little"][0]) >= 1 and int(said["plenty"][0]) == 0
    assert said["little"][1] == said["plenty"][1]


# ------------------------------------------------------------------------------------------------ what fits


def test_what_is_left_open_is_what_fits(tiny, monkeypatch) -> None:
    rows = encode_examples(tiny.tokenizer, EXAMPLES)
    each = {on: memory.training_row_bytes(tiny, max(len(row.ids) for row in rows), checkpointing=on) for on in (False, True)}
    assert each[True] < each[False]

    def decided(free: float, **options) -> tuple[int | None, bool | None]:
        monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=free / memory.SHARE + 8))
        config = fitted(tiny, rows, replace(CONFIG, **options))
        return config.micro_batch_size, config.gradient_checkpointing

    assert decided(1e15) == (8, False) and decided(8 * each[False]) == (8, False)
    assert decided(7 * each[False]) == (4, False) and decided(1 * each[False]) == (1, False)
    assert decided(0.99 * each[False])[1] and decided(0) == (1, True)  # the run itself says if that does not fit either
    assert decided(7 * each[False], micro_batch_size=8) == (8, True)  # asked for: kept, with checkpointing where it does not fit without
    assert decided(0, micro_batch_size=8, gradient_checkpointing=False) == (8, False)
    assert decided(1e15, gradient_checkpointing=True) == (8, True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("shape", "rows", "tokens"), [("meta-llama/Llama-3.2-1B-Instruct", 4, 300), ("meta-llama/Llama-3.2-1B-Instruct", 8, 64)]
)
def test_the_rule_of_thumb_is_near_the_plan(shape, rows, tokens, checkpointing) -> None:
    with Meter() as meter:
        bare = skeleton.skeleton(skeleton.config_of(shape), dtype=torch.float32, context=tokens)
        sae = stages.plain_sae("blocks.9.hook_resid_post", bare.cfg.d_model, 1024)
        with stages.trainable(bare, TrainingConfig(gradient_checkpointing=checkpointing)):
            batch = stages.rows_of(rows, tokens, bare.device)
            counted = stages.peak_of(meter, lambda: stages.training_step(bare, batch, sae, [1, 2], live=True))
        assert rows * memory.training_row_bytes(bare, tokens, checkpointing=checkpointing) == pytest.approx(counted, rel=0.25)
