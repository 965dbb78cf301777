"""The training loop under `finetune`: plain torch, one optimizer step at a time."""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from blockem_tl.data.chat import Encoded, pad
from blockem_tl.models.load import Model
from blockem_tl.models.memory import halved, is_out_of_memory
from blockem_tl.models.sharding import is_sharded
from blockem_tl.training.active import ActiveDefences, naming, not_finite
from blockem_tl.training.checkpoints import Checkpoints, load_run, restore_generators, restore_optimizer
from blockem_tl.training.config import TrainingConfig
from blockem_tl.training.identity import identity_of
from blockem_tl.training.loss import summed_cross_entropy
from blockem_tl.types import Example
from blockem_tl.views.progress import progress_bar

Row = dict[str, float]
"""One step's numbers."""

_SITE = re.compile(r"blocks\.(\d+)\.hook_resid_post")
_UNSHOWN = ("step", "epoch", "loss", "grad_norm")
_SMALLER = "train with gradient_checkpointing=True, shorten the rows"


class Loop:
    """The run of one adapter over its rows. `step` makes one update:

    1. take the step's rows (every epoch in an order of its own) and this process's share of them
    2. for each micro-batch: attach the defences, run forward and backward, detach them; in halves where memory runs out
    3. check and clip the gradient, set the learning rate, update the weights
    4. let the defences close the step, and keep its numbers as a row of ``history``

    Under ``torchrun`` each of the processes has a share of every step; alone, it has all of it.
    """

    def __init__(
        self,
        model: Model,
        adapter: str,
        examples: Sequence[Example],
        encoded: Sequence[Encoded],
        config: TrainingConfig,
        defences: ActiveDefences,
        checkpoints: Checkpoints | None,
    ) -> None:
        self.model, self.adapter, self.examples, self.encoded = model, adapter, examples, encoded
        self.config, self.defences, self.checkpoints = config, defences, checkpoints
        self.processes = PartialState(cpu=model.device.type == "cpu")
        self.micro = config.micro_batch(self.processes.num_processes)
        self.steps_per_epoch = math.ceil(len(encoded) / config.batch_size)
        self.last_step = math.ceil(config.epochs * self.steps_per_epoch)
        self.history: list[Row] = []
        self.parameters = model.adapter_parameters(adapter)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=0.0, fused=True)
        self.sharded = is_sharded(model)
        self.network = DistributedDataParallel(model.hf) if self.processes.num_processes > 1 and not self.sharded else model.hf
        self.identity = identity_of(model, adapter, encoded, config, defences.defences) if checkpoints else {}

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.history)

    def prepare(self, *, resume: bool) -> None:
        """Let the defences prepare, and go on from the last checkpoint if there is one. Raises as `Checkpoints.to_resume` does."""
        last = self.checkpoints.to_resume(self.identity, resume=resume) if self.checkpoints else None
        with self._autocast():
            self.defences.prepare(self.encoded)
        if last is not None:
            run = load_run(last)
            self.model.restore_adapter(last, self.adapter)
            restore_optimizer(self.optimizer, last)
            restore_generators(last)
            self.history.extend(run["history"])
            self.micro = min(self.micro, int(run.get("micro_batch", self.micro))) or 1  # halved before: the same sums again
            self.defences.restore(run["defences"])

    def run(self, stop_when: Callable[[Model, int], bool] | None, on_step: Callable[[Row], Any] | None, progress: bool) -> None:
        """All steps that are left; then the defences that act on the trained adapter."""
        main, stop = self.processes.is_main_process, False
        with progress_bar(total=self.last_step, initial=self.done, desc=f"train {self.adapter}", show=progress and main) as bar:
            while self.done < self.last_step and not stop:
                before = self.history[-1]["epoch"] if self.history else 0.0
                row = self.step()
                bar.set_postfix(_shown(row), refresh=False)
                bar.update()
                if on_step is not None and main:
                    on_step(dict(row))
                if stop_when is not None:
                    self.model.original_model.eval()
                    stop = stop_when(self.model, self.done)
                if self.checkpoints and (self.checkpoints.due(before, row["epoch"]) or self.done == self.last_step):
                    self.checkpoints.save(self.model, self.adapter, self.optimizer, self._state())
        self.model.check_adapter_finite(self.adapter)  # the last step's update is in no loss
        self.defences.finish(self.adapter)

    def step(self) -> Row:
        """One optimizer step over all processes; its numbers."""
        rows = self._rows()
        tokens = sum(len(self.encoded[i].ids) - max(1, self.encoded[i].n_prompt) for i in rows)
        each = len(rows) // self.processes.num_processes
        share = rows[each * self.processes.process_index :][:each]
        self.network.train()
        loss = self._backward(share, tokens, len(rows))
        for parameter in self.parameters if self.sharded else ():  # DistributedDataParallel does it otherwise
            parameter.grad = cast(Tensor, reduce(parameter.grad, "mean"))
        norm = float(clip_grad_norm_(self.parameters, self.config.max_grad_norm or math.inf))
        if not math.isfinite(norm):  # the step would leave an adapter of NaN, and a checkpoint of it
            raise not_finite(f"the gradient became {norm}", self._where(share))
        rate = self.config.learning_rate_at(self.done, self.last_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        numbers = self.defences.close_step(loss=float(loss))
        epoch, position = divmod(self.done, self.steps_per_epoch)
        row = {"step": float(self.done + 1), "epoch": epoch + (position + 1) / self.steps_per_epoch, **numbers}
        self.history.append(row | {"grad_norm": norm, "learning_rate": rate})
        return self.history[-1]

    def _rows(self) -> list[int]:
        """The rows of the coming step. A step that the processes cannot share evenly is filled up with the epoch's first rows."""
        epoch, position = divmod(self.done, self.steps_per_epoch)
        order = torch.randperm(len(self.encoded), generator=torch.Generator().manual_seed(self.config.seed + epoch)).tolist()
        rows, world = order[position * self.config.batch_size :][: self.config.batch_size], self.processes.num_processes
        return rows + (order * (world - 1))[: -len(rows) % world]

    def _backward(self, share: Sequence[int], tokens: int, examples: int) -> Tensor:
        """Add the gradient of this process's share of the step, in micro-batches, which are halved where memory runs out; its loss."""
        loss, waiting = torch.zeros((), device=self.model.device), list(share)
        while waiting:
            rows = waiting[: self.micro]
            before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
            failed = None
            try:
                with self._synchronising(len(rows) == len(waiting)):
                    loss += self._micro_backward(rows, tokens, examples)
                waiting = waiting[len(rows) :]
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.processes.num_processes > 1:  # the others would wait for this one
                    raise
                failed = str(error)
            if failed is not None:  # outside of the except block, where the error would still hold the tensors
                for parameter, gradient in zip(self.parameters, before, strict=True):
                    parameter.grad = gradient
                longest = max(len(self.encoded[i].ids) for i in rows)
                self.micro = halved(len(rows), longest, failed, option="micro_batch_size", advice=_SMALLER, stacklevel=6)
        return loss

    def _micro_backward(self, rows: Sequence[int], tokens: int, examples: int) -> Tensor:
        """Add the gradient of one micro-batch's part of the step's loss; that part."""
        batch = pad([self.encoded[i] for i in rows], self.model.pad_id, side="right", device=self.model.device)
        world = self.processes.num_processes  # the processes' gradients are averaged
        with ExitStack() as contexts:
            with self._autocast():
                penalties = contexts.enter_context(self.defences.during_step(batch))
                logits = cast(Any, self.network)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
                sft = summed_cross_entropy(logits, batch) / tokens * world
                with naming(lambda: self._where(rows)):
                    parts = penalties(logits, examples)
            loss = self.defences.loss(sft, parts, world, lambda: self._where(rows))
            loss.backward()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.config.bf16)

    def _synchronising(self, last: bool) -> AbstractContextManager[Any]:
        return self.network.no_sync() if isinstance(self.network, DistributedDataParallel) and not last else nullcontext()

    def _where(self, rows: Sequence[int]) -> str:
        good = self.checkpoints.all() if self.checkpoints else []
        safe = f", the last good checkpoint is {good[-1]}" if good else ""
        return f"at step {self.done + 1} on rows {[self.examples[i].id for i in rows]}{safe}"

    def _state(self) -> dict[str, Any]:
        finished = self.done == self.last_step
        state = {"step": self.done, "finished": finished, "identity": self.identity, "micro_batch": self.micro, "history": self.history}
        return {**state, "defences": self.defences.state()}


@contextmanager
def computing_as(model: Model, config: TrainingConfig):
    """Inside the block the model checkpoints gradients if the configuration says so; afterwards it is in the mode that it was in.

    Where LoRA computes in bf16 its inputs are no longer copied to float32, from which autocast would round them back.
    """
    hf, training = cast(Any, model.original_model), model.original_model.training
    if config.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})  # the reentrant kind would cut the penalty's gradient
    try:
        with disable_input_dtype_casting(hf, active=config.bf16):
            yield
    finally:
        if config.gradient_checkpointing:
            hf.gradient_checkpointing_disable()
            hf.disable_input_require_grads()
        hf.train(training)


def _shown(row: Row) -> dict[str, str]:
    """A step's numbers as the bar shows them, sites by their block's number: block/19+ 0.0123."""
    kept = {_SITE.sub(r"\1", key): value for key, value in row.items() if key not in _UNSHOWN}
    return {key.replace("learning_rate", "lr"): f"{value:.3g}" for key, value in kept.items()}
