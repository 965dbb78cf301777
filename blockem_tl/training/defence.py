"""The one interface of everything that can be done to a fine-tune against misalignment: a penalty, hooks, other rows, another adapter."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded
from blockem_tl.models.load import Model
from blockem_tl.types import Example

PenaltyFn = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]]
"""From the tuned model's logits to one penalty per example."""


@runtime_checkable
class Defence(Protocol):
    """What every defence is. The trainer adds ``weight`` times its penalty's mean over the step's examples to the SFT loss.

    ``watch`` is entered before the tuned model's forward and left after its backward (not if an error comes between), because gradient
    checkpointing runs parts of the forward again there: hooks must do the same again. Inside it the defence may run the base model and
    attach hooks, also hooks that change the forward; what it yields computes the penalty once the logits are there, or is None for a
    defence without one (its ``weight`` is then 0). ``weight`` is a number; anything else (one per site, "auto")
    says that the penalty comes weighted already, see `weight_of`.

    A defence may also be any of `RewritesRows`, `Prepares`, `Measures`, `Adapts`, `Records` and
    `FinishesAdapter`: the trainer asks.
    """

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float | Sequence[float] | str: ...

    def check(self, model: Model) -> None:
        """Raise ValueError where the defence cannot act on ``model``; asked before training starts."""
        ...

    def watch(self, model: Model, batch: Batch) -> AbstractContextManager[PenaltyFn | None]: ...


def weight_of(defence: Defence) -> float:
    """What the trainer multiplies the defence's penalty by."""
    return float(defence.weight) if isinstance(defence.weight, (int, float)) else 1.0


@runtime_checkable
class RewritesRows(Protocol):
    """A defence that changes what is trained on (inoculation prompting, interleaved safe data)."""

    def rewrite(self, examples: Sequence[Example], *, seed: int) -> list[Example]:
        """The rows to train on instead. Several such defences rewrite in the order in which they are given; ``seed`` is the run's."""
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
        """The numbers of the optimizer step just done, over all its micro-batches; asked once per step, so forget them after.

        They go to the run's history under these names, which therefore begin with the defence's own: "block/blocks.19.hook_resid_post+".
        """
        ...


@runtime_checkable
class Adapts(Protocol):
    """A defence that learns from the run (a weight that is found)."""

    def adapt(self, numbers: Mapping[str, float]) -> None:
        """Called after every optimizer step with its numbers, those of all defences, over all micro-batches and processes."""
        ...

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep of it."""
        ...

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from a checkpoint's state."""
        ...


@runtime_checkable
class Records(Protocol):
    """A defence whose weight means something only together with something else (an SAE's norms)."""

    def record(self) -> list[dict[str, Any]]:
        """The weight as it is now, with what it is relative to; kept with the run."""
        ...
