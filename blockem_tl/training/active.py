"""The defences of one run at work, as `finetune` and `defend` both need them: penalties in each micro-batch, numbers after each step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded
from blockem_tl.models.load import Model
from blockem_tl.training.defence import Adapts, Defence, DescribesWeight, FinishesAdapter, Measures, Prepares, RewritesRows, weight_of
from blockem_tl.types import Example

_TAKEN = ("step", "epoch", "loss", "sft", "grad_norm", "learning_rate")
Kind = TypeVar("Kind")
Penalties = Callable[[Tensor | None, int], dict[str, Tensor]]
"""From the tuned model's logits and the step's number of examples to each penalty's part of its mean over the step."""


class ActiveDefences:
    """The defences of one run, checked, and the numbers of its current step.

    Raises:
        ValueError: a defence that does not fit the model, two of one name, or an SAE that is spliced into the forward.
    """

    def __init__(self, model: Model, defences: Sequence[Defence]) -> None:
        model.check_unspliced()
        names = [defence.name for defence in defences]
        if len({*names, *_TAKEN}) < len(names) + len(_TAKEN):
            raise ValueError(f"defences: expected different names, none of them in {_TAKEN} (the log goes by name), got {names}")
        for defence in defences:
            defence.check(model)
        self.model, self.defences = model, list(defences)
        self._parts: dict[str, Tensor | float] = {}

    def _all(self, kind: type[Kind]) -> list[Kind]:
        return [defence for defence in self.defences if isinstance(defence, kind)]

    def rewrite(self, examples: Sequence[Example], seed: int) -> Sequence[Example]:
        """The rows to train on: ``examples``, or what the defences make of them."""
        for defence in self._all(RewritesRows):
            examples = defence.rewrite(examples, seed=seed)
        return examples

    def prepare(self, rows: Sequence[Encoded]) -> None:
        """Let the defences compute on the rows to come what they need. Raises ValueError if one of them cannot act."""
        for defence in self._all(Prepares):
            defence.prepare(self.model, rows)

    @contextmanager
    def during_step(self, batch: Batch) -> Iterator[Penalties]:
        """All defences' contexts around the forward and backward of one micro-batch; yields what computes their penalties.

        If the block fails, its parts of the loss do not count, so that it can be tried again.
        """
        before = dict(self._parts)
        try:
            with ExitStack() as contexts:
                entered = [(defence.name, contexts.enter_context(defence.during_step(self.model, batch))) for defence in self.defences]
                yield lambda logits, examples: {name: penalty(logits).sum() / examples for name, penalty in entered if penalty is not None}
        except BaseException:
            self._parts = before
            raise

    def loss(self, sft: Tensor, penalties: Mapping[str, Tensor], scale: int, where: Callable[[], str]) -> Tensor:
        """``sft`` with ``scale`` times the weighted penalties added. The parts count for the step's numbers.

        Args:
            scale: the factor on ``sft`` as it comes.
            where: the step and the rows, for the error.

        Raises:
            FloatingPointError: a loss that is NaN or infinite.
            ValueError: a penalty with a weight and without a gradient.
        """
        weighted = sum(weight_of(defence) * penalties[defence.name] for defence in self.defences if defence.name in penalties)
        loss = sft + scale * weighted
        parts = {**penalties, "sft": sft / scale}
        if not torch.isfinite(loss):
            listed = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in parts.items())
            raise not_finite(f"the loss became {float(loss.detach())} ({listed})", where())
        idle = [d.name for d in self.defences if d.name in penalties and weight_of(d) and not penalties[d.name].requires_grad]
        if idle and sft.requires_grad:
            raise ValueError(
                f"the penalty of {idle} has no gradient {where()}, so it would not act: was what it reads recorded in a forward without "
                "gradient, or detached?"
            )
        for name, value in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + value.detach()
        return loss

    def close_step(self, **more: float) -> dict[str, float]:
        """The step's numbers over all processes: the parts of the loss, what the defences measured, ``more``. Defences adapt to them."""
        world = PartialState().num_processes  # parts add up over processes, the rest averages
        numbers = more | {name: float(value) * world for name, value in self._parts.items()}
        for defence in self._all(Measures):
            numbers |= {name: float(value) for name, value in defence.metrics().items()}
        if world > 1:
            values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.model.device)
            numbers = dict(zip(numbers, cast(Tensor, reduce(values, "mean")).tolist(), strict=True))
        self._parts = {}
        for defence in self._all(Adapts):
            defence.adapt(numbers)
        return numbers

    @torch.no_grad()
    def finish(self, adapter: str) -> None:
        """Let the defences that act on the trained adapter do so."""
        self.model.original_model.eval()
        for defence in self._all(FinishesAdapter):
            defence.finish(self.model, adapter)

    def state(self) -> dict[str, dict[str, float]]:
        """By name, the numbers that a checkpoint must keep."""
        return {cast(Defence, defence).name: defence.state() for defence in self._all(Adapts)}

    def restore(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from a checkpoint's state."""
        for defence in self._all(Adapts):
            defence.restore(state[cast(Defence, defence).name])

    def describe_weights(self) -> dict[str, list[dict[str, Any]]]:
        """By name, the weights that mean something only together with something else."""
        return {cast(Defence, defence).name: defence.describe_weight() for defence in self._all(DescribesWeight)}


@contextmanager
def naming(where: Callable[[], str]) -> Iterator[None]:
    """Inside the block an error of numbers also names the step and its rows."""
    try:
        yield
    except FloatingPointError as error:
        raise not_finite(str(error), where()) from error


def not_finite(what: str, where: str) -> FloatingPointError:
    """The error for a loss or gradient that is NaN or infinite."""
    return FloatingPointError(f"{what} {where}: lower the learning rate or the weights")
