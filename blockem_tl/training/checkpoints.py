"""Checkpoints of a fine-tune: plain adapters that any tool loads, with what it takes to go on from them to the last bit. No pickle.

folder/epoch-0.5/   adapter_config.json, adapter_model.safetensors   the adapter, in peft's plain format
                    training_state.safetensors                       optimizer moments, random number generators
                    run.json                                         step, history, the defences' states, the run's identity
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockem_tl.models.load import Model
from blockem_tl.storage import files, machine
from blockem_tl.training.identity import differences

_FORMAT = 1
_MARK = "run.json"
_STATE = "training_state.safetensors"


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
        """The checkpoint to go on from: the last, or None if there is none.

        Raises:
            FileExistsError: there are checkpoints, and nobody asked to resume.
            ValueError: they are another run's, naming the fields that differ.
        """
        found = self.all()
        if not found:
            return None
        if not resume:
            raise FileExistsError(f"{self.folder} holds checkpoints up to {found[-1].name}: pass resume=True to go on, or another folder")
        changed = differences(load_run(found[-1])["identity"], identity)
        if changed:
            raise ValueError(f"{found[-1]} is a checkpoint of another run: {'; '.join(changed)}. Choose another folder, or run that one")
        return found[-1]

    @contextmanager
    def held(self, *, cpu: bool = True) -> Iterator[None]:
        """Inside the block no other run writes here; of several processes of one run the first holds it. Raises as `files.held`.

        cpu: whether the run is on a CPU: who asks for the processes first also decides how they talk.
        """
        with files.held(self.folder) if PartialState(cpu=cpu).is_main_process else nullcontext():
            yield

    def due(self, before: float, now: float) -> bool:
        """Whether a multiple of the time between checkpoints lies between two times (in epochs)."""
        return int(now / self.every_epochs + 1e-9) > int(before / self.every_epochs + 1e-9)

    def save(self, model: Model, adapter: str, optimizer: torch.optim.Optimizer, run: Mapping[str, Any]) -> Path:
        """Write the run's state, whole or not at all. The first process writes; the others hand over their random states.

        Raises FloatingPointError for an adapter with NaN or infinity in it.
        """
        model.check_adapter_finite(adapter)
        target = self.folder / f"epoch-{_epochs(run):g}"
        generators = cast(list[dict[str, Tensor]], gather_object([_generators()]))
        if PartialState().is_main_process:
            with files.finished_folder(target, replaces=_MARK) as folder:
                model.write_adapter(folder, adapter)
                save_file({**_moments(optimizer), **_numbered(generators)}, folder / _STATE)
                files.write_json(folder / _MARK, {"format": _FORMAT, **run, "environment": machine.described()})
        PartialState().wait_for_everyone()
        return target


def load_run(checkpoint: Path | str) -> dict[str, Any]:
    """The contents of a checkpoint's run.json. Raises ValueError naming the file if it is none, or another version's."""
    path = Path(checkpoint) / _MARK
    run = files.read_json(path)
    if not isinstance(run, dict) or run.get("format") != _FORMAT:
        raise ValueError(f"{path}: expected a checkpoint in format {_FORMAT}; was it written by another version?")
    history, identity = run.get("history"), run.get("identity")
    steps = history if isinstance(history, list) and all(isinstance(row, dict) for row in history) else []
    counts = [row.get("epoch") for row in steps] + [run.get("step"), run.get("micro_batch", 1)]
    if not steps or not all(_is_count(count) for count in counts):
        raise ValueError(f"{path}: expected the steps of a training run, each with its epoch: the file is broken, copy it anew")
    if not isinstance(identity, dict) or not all(isinstance(text, str) for text in identity.values()):
        raise ValueError(f"{path}: expected a run's identity as texts by name: the file is broken, copy it anew")
    return run


def _is_count(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e15


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
    return sorted(zip(map(_epochs, runs), folders, strict=True))


def restore_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Path | str) -> None:
    """Give the optimizer (AdamW) a checkpoint's moments. Raises ValueError if they are broken, or another run's."""
    saved, state = _state(checkpoint), dict[int, dict[str, Tensor]]()
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        shapes = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size()}
        state[index] = {name: saved.get(f"optimizer.{index}.{name}", torch.tensor([])) for name in shapes}
        wrong = [name for name, tensor in state[index].items() if tensor.shape != shapes[name] or not torch.isfinite(tensor).all()]
        if wrong:
            raise ValueError(
                f"{Path(checkpoint) / _STATE}: expected finite moments of every trained tensor, got something else in {wrong} of tensor "
                f"{index}: the file is broken, or another run's; go on from an older checkpoint"
            )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _state(checkpoint: Path | str) -> dict[str, Tensor]:
    path = Path(checkpoint) / _STATE
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: expected a training's state as safetensors, got a broken file: {error}; copy it anew") from error


def restore_generators(checkpoint: Path | str) -> None:
    """Set this process's random states (the first one's, if there were fewer processes). Raises ValueError if they are broken."""
    tensors, process = _state(checkpoint), PartialState().process_index
    chosen = process if f"generator.{process}.cpu" in tensors else 0
    try:
        torch.random.set_rng_state(tensors[f"generator.{chosen}.cpu"])
        if torch.cuda.is_available() and f"generator.{chosen}.cuda" in tensors:
            torch.cuda.random.set_rng_state(tensors[f"generator.{chosen}.cuda"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{Path(checkpoint) / _STATE}: expected the states of random number generators, got {error}") from error


def _whole(folder: Path) -> list[Path]:
    return sorted((mark.parent for mark in folder.glob(f"epoch-*/{_MARK}")), key=lambda checkpoint: load_run(checkpoint)["step"])


def _epochs(run: Mapping[str, Any]) -> float:
    return round(run["history"][-1]["epoch"], 6)


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.random.get_rng_state()}
    return {**states, "cuda": torch.cuda.random.get_rng_state()} if torch.cuda.is_available() else states


def _numbered(generators: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"generator.{process}.{device}": state for process, states in enumerate(generators) for device, state in states.items()}


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{name}": torch.as_tensor(value).cpu().contiguous() for i, part in state.items() for name, value in part.items()}
