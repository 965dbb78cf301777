"""Checkpoints of a fine-tune: plain adapters that any tool loads, with what it takes to go on from them to the last bit. No pickle.

folder/epoch-0.5/   adapter_config.json, adapter_model.safetensors   the adapter, in peft's plain format
                    training_state.safetensors                       optimizer moments, random number generators
                    trainer_state.json, run.json                     the Trainer's counters; step, history and what the run is
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blockem_tl.storage import files
from blockem_tl.training.defence import Adapts
from blockem_tl.training.identity import differences

if TYPE_CHECKING:
    from blockem_tl.training.finetune import FineTuner

_FORMAT = 1
_MARK = "run.json"


class Checkpoints:
    """The checkpoints of one run in one folder.

    Raises:
        ValueError: a folder that cannot be written, or a time between checkpoints that is not positive.
    """

    def __init__(self, folder: Path | str, every_epochs: float) -> None:
        if not every_epochs > 0:
            raise ValueError(f"save_every_epochs: expected a positive number of epochs, got {every_epochs}")
        self.folder, self.every_epochs = files.check_writable(folder), every_epochs

    def all(self) -> list[Path]:
        """Whole checkpoints, the oldest first."""
        return _whole(self.folder)

    def to_resume(self, identity: Mapping[str, str], *, resume: bool) -> Path | None:
        """The checkpoint to go on from: the last, or None where there is none.

        Raises:
            FileExistsError: there are checkpoints, and nobody asked to resume.
            ValueError: they are another run's, naming the fields that differ.
        """
        found = self.all()
        if not found:
            return None
        if not resume:
            raise FileExistsError(f"{self.folder} holds checkpoints up to {found[-1].name}: pass resume=True to go on, or another folder")
        run = files.read_json(found[-1] / _MARK)
        if run.get("format") != _FORMAT:
            raise ValueError(f"{found[-1]}: expected a checkpoint in format {_FORMAT}; was it written by another version?")
        changed = differences(run["identity"], identity)
        if changed:
            raise ValueError(f"{found[-1]} is a checkpoint of another run: {'; '.join(changed)}. Choose another folder, or run that one")
        return found[-1]

    def save(self, trainer: "FineTuner") -> Path:
        """Write the trainer's state, whole or not at all; the first process writes, the others hand over their random states."""
        epochs = round(float(cast(float, trainer.state.epoch)), 6)
        target = self.folder / f"epoch-{epochs:g}"
        generators = gather_object([_generators()]) if trainer.accelerator.num_processes > 1 else [_generators()]
        if trainer.is_world_process_zero():
            with files.finished_folder(target, replaces=_MARK) as folder:
                trainer.lens.write_adapter(folder, trainer.adapter)
                save_file({**_moments(trainer.optimizer), **_numbered(generators)}, folder / "training_state.safetensors")
                trainer.state.save_to_json(str(folder / "trainer_state.json"))
                files.write_json(folder / _MARK, _run_of(trainer))
        trainer.accelerator.wait_for_everyone()
        return target


def _run_of(trainer: "FineTuner") -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "step": trainer.state.global_step,
        "finished": trainer.state.global_step >= trainer.state.max_steps,
        "identity": trainer.identity,
        "history": trainer.history,
        "learning_rates": [group["lr"] for group in cast(Any, trainer.optimizer).param_groups],
        "scheduler": {name: value for name, value in cast(Any, trainer.lr_scheduler).state_dict().items() if name != "lr_lambdas"},
        "defences": {defence.name: defence.state() for defence in trainer.defences if isinstance(defence, Adapts)},
        "environment": files.environment(),
    }


def load_run(checkpoint: Path | str) -> dict[str, Any]:
    """What run.json of a checkpoint says."""
    return cast(dict[str, Any], files.read_json(Path(checkpoint) / _MARK))


def trajectory(checkpoints: str | Path | Sequence[str | Path]) -> list[tuple[float, Path]]:
    """(epochs, folder) of a run's checkpoints, the oldest first: all of the run's folder, or those that are listed.

    Raises:
        ValueError: no checkpoint, a folder that is none, or checkpoints of different runs, naming what differs.
    """
    if isinstance(checkpoints, (str, Path)):
        folders = [Path(checkpoints)] if (Path(checkpoints) / _MARK).is_file() else _whole(Path(checkpoints))
    else:
        folders = [Path(checkpoint) for checkpoint in checkpoints]
    lost = [str(folder) for folder in folders if not (folder / _MARK).is_file()]
    if lost or not folders:
        raise ValueError(
            f"expected checkpoints of finetune(checkpoints=...), each with a {_MARK}, got {lost or f'none in {checkpoints}'}; adapters "
            "from elsewhere can be loaded with model.load_adapter and named as arms"
        )
    runs = [load_run(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        changed = differences(runs[0]["identity"], run["identity"])
        if changed:
            raise ValueError(f"{folder} is a checkpoint of another run than {folders[0]}: {'; '.join(changed)}. Measure run by run")
    order = sorted(range(len(folders)), key=lambda i: runs[i]["step"])
    return [(round(float(files.read_json(folders[i] / "trainer_state.json")["epoch"]), 6), folders[i]) for i in order]


def _whole(folder: Path) -> list[Path]:
    marks = [(files.read_json(mark)["step"], mark.parent) for mark in folder.glob(f"epoch-*/{_MARK}")]
    return [path for _, path in sorted(marks)]


def restore_optimizer(trainer: "FineTuner", checkpoint: Path | str) -> None:
    """Moments, learning rates and schedule of a checkpoint."""
    run, tensors = load_run(checkpoint), load_file(Path(checkpoint) / "training_state.safetensors")
    optimizer, scheduler = cast(Any, trainer.optimizer), cast(Any, trainer.lr_scheduler)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, index, *rest = name.split(".")
        if kind == "optimizer":
            state.setdefault(int(index), {})[rest[0]] = tensor
    groups = [{**group, "lr": lr} for group, lr in zip(optimizer.state_dict()["param_groups"], run["learning_rates"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict({**scheduler.state_dict(), **run["scheduler"]})


def restore_generators(checkpoint: Path | str, process: int) -> None:
    """The random states of one process (of the first, where there were fewer processes)."""
    tensors = load_file(Path(checkpoint) / "training_state.safetensors")
    chosen = process if f"generator.{process}.cpu" in tensors else 0
    torch.random.set_rng_state(tensors[f"generator.{chosen}.cpu"])
    if torch.cuda.is_available() and f"generator.{chosen}.cuda" in tensors:
        torch.cuda.random.set_rng_state(tensors[f"generator.{chosen}.cuda"])


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.random.get_rng_state()}
    return {**states, "cuda": torch.cuda.random.get_rng_state()} if torch.cuda.is_available() else states


def _numbered(generators: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"generator.{process}.{device}": state for process, states in enumerate(generators) for device, state in states.items()}


def _moments(optimizer: Any) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(value).cpu().contiguous() for i, part in state.items() for name, value in part.items()}


class SaveEvery(TrainerCallback):
    """Ask for a checkpoint whenever a multiple of ``epochs`` is passed, and at the last step."""

    def __init__(self, epochs: float) -> None:
        self.epochs = epochs

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start counting where the run starts."""
        self.passed = self._multiples(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask."""
        control.should_save = self._multiples(state) > self.passed or state.global_step >= state.max_steps
        self.passed = self._multiples(state)

    def _multiples(self, state: TrainerState) -> int:
        return int((state.epoch or 0.0) / self.epochs + 1e-9)
