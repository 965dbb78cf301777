"""The one interface of everything that can be added to a fine-tuning loss."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from blockem_tl.models import Model
from blockem_tl.prompts import Batch

PenaltyFn = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, " batch"]]
"""From the tuned model's logits to one penalty per example."""


@runtime_checkable
class Defence(Protocol):
    """A penalty on how fine-tuning changes the model. The trainer adds ``weight`` times its mean over examples to the SFT loss.

    ``watch`` is entered before the tuned model's forward and left after the loss: inside it the defence may run the base model and
    attach hooks; what it yields computes the penalty once the logits are there.
    """

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def check(self, model: Model) -> None:
        """Raise ValueError where the defence cannot act on ``model``; asked before training starts."""
        ...

    def watch(self, model: Model, batch: Batch) -> AbstractContextManager[PenaltyFn]: ...
