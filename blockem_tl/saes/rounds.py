"""An SAE's training in rounds: each draws its tokens anew, and after each the state is kept. Killed, it goes on to the same bits."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from blockem_tl.storage import files

ROUNDS = 20
_MARK = "run.json"


class Rounds:
    """The states of one training in one folder, each in a folder of its own; the last whole one counts.

    Raises:
        ValueError: a folder that cannot be written, or that holds another training's state.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder, self.identity = folder, dict(identity)
        last = self.last()
        if last is not None and (found := files.read_json(last / _MARK)) != self.identity:
            differs = [name for name in self.identity if found.get(name) != self.identity[name]]
            raise ValueError(
                f"{folder} holds the state of another SAE's training (other {', '.join(differs)}): delete it, or choose another out"
            )

    def last(self) -> Path | None:
        """The last whole state."""
        whole = [path for path in self.folder.glob("round-*") if (path / _MARK).is_file()]
        return max(whole, key=lambda path: int(path.name.removeprefix("round-")), default=None)

    def save(self, trainer: Any, n: int) -> None:
        """Keep the state after round ``n``, whole or not at all, and then drop the one before."""
        before = self.last()
        with files.finished_folder(self.folder / f"round-{n}", replaces=_MARK) as temporary:
            trainer.sae.save_model(temporary)
            trainer.save_trainer_state(temporary)
            files.write_json(temporary / _MARK, self.identity)
        if before is not None:
            files.remove_folder(before)

    def restore(self, trainer: Any) -> None:
        """Go on from the last state, if there is one. Raises ValueError for a state that is broken, or holds more than tensors."""
        if (last := self.last()) is None:
            return
        try:
            trainer.sae.load_weights_from_checkpoint(last)
            trainer.load_trainer_state(last)  # by torch.load, which unpickles nothing: weights_only is its default
        except Exception as error:  # its readers have no common class
            raise ValueError(f"{self.folder} cannot be gone on from: {str(error)[:300]}. To train anew, delete it") from error

    def remove(self) -> None:
        """Forget everything: the SAE is there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def fit_in_rounds(
    sae: Any, schedule: SAETrainerConfig, batches: Callable[[int], Iterator[Tensor]], seed: int, rounds: Rounds | None
) -> None:
    """Train ``sae`` as SAELens's trainer does; ``batches(n)`` are round n's. With ``rounds`` it goes on from a kept state."""
    trainer: Any = None

    def provided() -> Iterator[Tensor]:
        for n in range(ROUNDS):
            end = schedule.total_training_samples * (n + 1) // ROUNDS
            if trainer.n_training_samples >= end:
                continue  # done before it was killed
            torch.manual_seed(1000 * seed + n)  # of the mixing
            stream = batches(n)
            while trainer.n_training_samples < end:
                yield next(stream)
            if rounds is not None and n + 1 < ROUNDS:
                rounds.save(trainer, n)

    trainer = SAETrainer(schedule, sae, provided())
    if rounds is not None:
        rounds.restore(trainer)
    trainer.fit()
