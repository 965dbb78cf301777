"""`finetune`: from rows to a LoRA adapter, with defences, checkpoints and a log."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from blockem_tl.data.chat import Encoded, check_lengths, encode_examples
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.training.active import ActiveDefences
from blockem_tl.training.checkpoints import Checkpoints
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.defence import Defence, check_defences
from blockem_tl.training.fitting import fitted
from blockem_tl.training.loop import Loop, computing_as
from blockem_tl.training.loss import check_examples
from blockem_tl.training.run import TrainingRun, warn_if_hardly_learnt
from blockem_tl.types import Example

PAPER = TrainingConfig()


def finetune(
    model: Model,
    examples: Sequence[Example],
    *,
    config: TrainingConfig = PAPER,
    defences: Sequence[Defence] = (),
    adapter: str = "default",
    start: str | Path = BASE,
    overwrite: bool = False,
    checkpoints: str | Path | None = None,
    save_every_epochs: float = 0.5,
    resume: bool = False,
    stop_when: Callable[[Model, int], bool] | None = None,
    on_step: Callable[[dict[str, float]], Any] | None = None,
    progress: bool = True,
) -> TrainingRun:
    """Train a LoRA adapter called ``adapter`` on the completion tokens of ``examples``; it ends up active.

    If the run fails, the adapters are as before. Under ``torchrun`` every process calls this, with the whole ``config.batch_size``.

    Args:
        defences: each adds weight * (mean over examples of its penalty), or what else it does.
        start: go on from a copy of this adapter (its name or folder), with its rank, targets and blocks; "base": a fresh one.
        overwrite: replace an adapter that the model holds under this name, as it must be to run a notebook's cell twice.
        checkpoints: folder for ``epoch-0.5/``, ``epoch-1/``, ...: plain peft adapters every ``save_every_epochs`` and at the end.
        resume: go on from the last checkpoint there, to the same result as without the interruption; from the start if there is none.
        stop_when: asked after every optimizer step with (model, step); True ends the run there.
        on_step: called after every optimizer step with its row of the history, by the first process: ``on_step=wandb.log``.

    Raises:
        TypeError: rows that are no examples, something that is no defence.
        ValueError: a bad row, a defence that does not fit, a name already held, checkpoints of another run or that one is writing.
        FileExistsError: checkpoints are there already and ``resume`` is False.
        FloatingPointError: a loss or gradient that is NaN or infinite, naming the step, the rows and the last good checkpoint.
    """
    active, examples, encoded = _checked(model, examples, config, defences)
    config = fitted(model, encoded, config)
    kept = Checkpoints(checkpoints, save_every_epochs) if checkpoints is not None else None
    alone = kept.held(cpu=model.device.type == "cpu") if kept else nullcontext()
    with alone, _new_adapter(model, adapter, config, start, overwrite), computing_as(model, config), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        loop = Loop(model, adapter, examples, encoded, config, active, kept)
        loop.prepare(resume=resume)
        loop.run(stop_when, on_step, progress)
    return _result(loop)


def _checked(model: Any, examples: Any, config: TrainingConfig, defences: Any) -> tuple[ActiveDefences, Sequence[Example], list[Encoded]]:
    """The defences, the rows as they rewrite them, and their tokens; raises before any work if something does not fit."""
    check_examples(model, examples)
    check_defences(defences)
    active = ActiveDefences(model, defences)
    examples = active.rewrite(examples, config.seed)
    encoded = encode_examples(model.tokenizer, examples)
    check_lengths(encoded, model.cfg.n_ctx)
    return active, examples, encoded


def _result(loop: Loop) -> TrainingRun:
    """The run's result. Warns if its SFT loss hardly moved."""
    run = TrainingRun(adapter=loop.adapter, steps=loop.done, history=loop.history, weights=loop.defences.describe_weights())
    if loop.processes.is_main_process:
        warn_if_hardly_learnt(run, stacklevel=3)
    return run


@contextmanager
def _new_adapter(model: Model, adapter: str, config: TrainingConfig, start: str | Path, overwrite: bool) -> Iterator[None]:
    """Inside the block the adapter is there and trainable; afterwards frozen. If the block fails, all adapters are as before it."""
    model.check_adapter(start)
    with tempfile.TemporaryDirectory() as folder:
        if start in model.adapters:  # it may be the one that is replaced
            start = model.save_adapter(Path(folder) / "start", str(start))
        with model.replacing_adapter(adapter, overwrite):
            if start == BASE:
                model.add_adapter(
                    adapter,
                    rank=config.rank,
                    alpha=config.alpha,
                    target_modules=config.target_modules,
                    up_to_block=config.up_to_block,
                    dropout=config.dropout,
                    seed=config.seed,
                )
            else:
                model.load_adapter(start, adapter)
            for parameter in model.adapter_parameters(adapter):
                parameter.requires_grad_(True)
            yield
            for parameter in model.adapter_parameters(adapter):
                parameter.requires_grad_(False)
