"""The one interface of everything that can be done to a fine-tune against misalignment: a penalty, hooks, other rows, another adapter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded
from blockem_tl.models.load import Model
from blockem_tl.types import Example

PenaltyFn = Callable[[Any], Float[Tensor, " batch"]]
"""From the tuned model's logits [batch pos d_vocab] to one penalty per example. They are None in TRL's SFTTrainer, which builds none."""

Positions = Literal["completion", "all"]
"""The tokens that a penalty acts on: the label-bearing ones, or also the question's (not template, system message or padding)."""


def check_positions(positions: object) -> None:
    """Raise ValueError for positions that are none."""
    if positions not in get_args(Positions):
        raise ValueError(f"expected positions among {get_args(Positions)}, got {positions!r}")


def acting_tokens(batch: Batch, positions: Positions) -> Bool[Tensor, "batch pos"]:
    """The tokens that a penalty at ``positions`` acts on."""
    return batch.reply if positions == "completion" else batch.mask & ~batch.system


@runtime_checkable
class Defence(Protocol):
    """The interface of every defence. Training adds ``weight`` times its penalty's mean over the step's examples to the SFT loss.

    A defence may also be any of `RewritesRows`, `Prepares`, `Measures`, `Adapts`, `DescribesWeight` and `FinishesAdapter`.
    """

    @property
    def name(self) -> str:
        """Name of its penalty and numbers in the run's history; no two defences of a run share one."""
        ...

    @property
    def weight(self) -> float | Sequence[float] | str:
        """Factor on its penalty (0 for a defence without one); anything but a number says that the penalty is weighted already."""
        ...

    def check(self, model: Model) -> None:
        """Raise ValueError if the defence cannot act on ``model``; asked before training starts."""
        ...

    def during_step(self, model: Model, batch: Batch) -> AbstractContextManager[PenaltyFn | None]:
        """A context for one micro-batch. It yields the penalty as a function of the tuned model's logits, or None.

        The context is entered before the tuned model's forward and left after its backward. Inside it the defence may run the base model
        and attach hooks, also hooks that change the forward. Gradient checkpointing runs parts of the forward again in the backward, so
        hooks must do the same twice.
        """
        ...


class NoPenalty:
    """Base class for defences without a penalty: they rewrite rows, attach hooks or act on the finished adapter."""

    weight = 0.0

    def check(self, model: Model) -> None:
        """Check nothing."""

    @contextmanager
    def during_step(self, model: Model, batch: Batch) -> Iterator[None]:
        """Do nothing."""
        yield None


def check_defences(defences: object) -> None:
    """Raise TypeError unless this is a list (or tuple) of defences, saying what was expected."""
    listed = isinstance(defences, (list, tuple))
    if not listed or not all(isinstance(defence, Defence) for defence in defences):
        got = [type(defence).__name__ for defence in defences] if listed else type(defences).__name__
        raise TypeError(f"expected a list of defences, as in defences=[Blocking(...)], got {got}")


def weight_of(defence: Defence) -> float:
    """Factor by which the trainer multiplies the defence's penalty: its weight, or 1 for a penalty that is weighted already."""
    return float(defence.weight) if isinstance(defence.weight, (int, float)) else 1.0


@runtime_checkable
class RewritesRows(Protocol):
    """A defence that changes what is trained on (inoculation prompting, interleaved safe data)."""

    def rewrite(self, examples: Sequence[Example], *, seed: int) -> list[Example]:
        """The rows to train on instead. Several such defences rewrite in the order in which they are given. ``seed`` is the run's."""
        ...


@runtime_checkable
class Prepares(Protocol):
    """A defence that computes something beforehand (stored references), or checks what only an adapter in place can show."""

    def prepare(self, model: Model, rows: Sequence[Encoded]) -> None:
        """Called once before each run, with the adapter in place and the rows as they will be trained on. Raises ValueError."""
        ...


@runtime_checkable
class FinishesAdapter(Protocol):
    """A defence that acts on the trained adapter (SafeLoRA)."""

    def finish(self, model: Model, adapter: str) -> None:
        """Change the adapter's tensors in place; called once, after the last step, in eval mode."""
        ...


@runtime_checkable
class Measures(Protocol):
    """A defence with numbers of its own to show and keep (how far each site has moved, whether an alarm went off)."""

    def metrics(self) -> dict[str, float]:
        """The numbers of the optimizer step just done, over all its micro-batches. They are asked for once per step: forget them after.

        They go into the run's history under these names, which begin with the defence's own: "block/blocks.19.hook_resid_post+".
        """
        ...


@runtime_checkable
class Adapts(Protocol):
    """A defence that learns from the run (a weight that is found)."""

    def adapt(self, numbers: Mapping[str, float]) -> None:
        """Called after every optimizer step with its numbers, those of all defences, over all micro-batches and processes."""
        ...

    def state(self) -> dict[str, float]:
        """The numbers that a checkpoint must keep."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's state."""
        ...


@runtime_checkable
class DescribesWeight(Protocol):
    """A defence whose weight means something only together with something else (an SAE's norms)."""

    def describe_weight(self) -> list[dict[str, Any]]:
        """One entry per target: "weight" as it is now, "peak", the largest in this run, and what they are relative to."""
        ...
