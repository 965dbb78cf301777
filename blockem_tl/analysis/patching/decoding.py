"""Decode patching: at every decoding step the last position's state at a site is another model's on the same tokens.

Section 5 and F.1 of the paper (experiment 2). Both models keep their own keys and values of the reply that the target makes, in lockstep::

    source    embed - 0 - ... - s - h            stops at the last site
                                    |
    target    embed - 0 - ... - s - h - s+1 - ... - logits - next token of both

so a step costs the same however long the reply is. Where the residual stream itself is patched to the end of the reply, the target's
blocks 0 to s run no more at generated tokens: their outputs are replaced at this position and at all later ones, so nothing sees them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from blockem_tl.analysis.patching.endpoints import PatchEndpoint, Plan, check_groups, choose_endpoints, holding, plan_steps, sweep_columns
from blockem_tl.generation._decoder import Decoder
from blockem_tl.generation._partial_forward import run_until_block, start_at_block
from blockem_tl.generation._scheduler import Job, fitting, make_job, run_job
from blockem_tl.generation.replies import Replies
from blockem_tl.generation.steering import Condition
from blockem_tl.hooks import Hook, HookNotFired
from blockem_tl.models.activations import stop_layer
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.types import Generation, Prompt


def decode_patching(
    model: Model,
    prompts: Sequence[Prompt],
    sites: Sequence[str] = (),
    *,
    groups: Sequence[Sequence[str]] = (),
    source: str | Path | Model = BASE,
    target: str | Path | None = None,
    steps: tuple[int, int | None] = (0, None),
    last_prompt_position: bool = True,
    max_new_tokens: int | Sequence[int] = 64,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Replies:
    """Replies while the newest position's state at a site is source's on the same tokens.

    They have the columns site, block, direction, patched ("decode") and patched_steps; each condition's name says which steps were patched.

    Args:
        sites: hook names, patched one after the other.  groups: sites that are patched together.
        steps: the window [start, stop) of patched decoding steps; stop None is the end of the reply. Step 0 runs on the last prompt token
            and chooses the first reply token; step t > 0 runs on reply token t - 1 (from 0) and chooses t.
        last_prompt_position: patch step 0, the procedure as the paper describes it; False is its formula (only t > T_pref).
        source, target, max_new_tokens, batch_size, temperature, seed: as for `patching_sweep`.

    Raises ValueError as `patching_sweep`, or for a window without a step; HookNotFired if every reply ended before it.
    """
    chosen = [*((site,) for site in sites), *(tuple(group) for group in groups)]
    if isinstance(sites, str) or not chosen or not all(chosen):
        raise ValueError(
            f"decode patching: expected sites=[...] or groups=[[...]] with at least one site in each, got {sites!r}, {groups!r}"
        )
    endpoints = choose_endpoints(model, source, target)
    check_groups(endpoints, chosen)
    window = Window(start=steps[0], stop=steps[1], at_prompt=last_prompt_position and steps[0] == 0)
    names = [f"{endpoints[0].name} into {endpoints[1].name} over {window} at {' + '.join(group)}" for group in chosen]
    jobs = [make_job(model, prompts, [Condition(name=name)], (), max_new_tokens, temperature, seed) for name in names]
    window.check(jobs[0])
    size = batch_size if batch_size is not None else max(1, fitting(jobs[0]) // 2)  # a row has keys and values of two models
    with holding(*endpoints) as (taken, into):
        found = [_patched(job, taken, into, group, window, size, progress) for job, group in zip(jobs, chosen, strict=True)]
    columns = sweep_columns(*endpoints, chosen, len(prompts)) | {"patched_steps": [n for _, counts in found for n in counts]}
    return Replies.of((g for replies, _ in found for g in replies), patched=["decode"] * len(columns["site"]), **columns)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The decoding steps [start, stop) that are patched; stop None is the end of the reply.  at_prompt: step 0 is among them."""

    start: int
    stop: int | None
    at_prompt: bool

    def __str__(self) -> str:
        end, how = "the end" if self.stop is None else self.stop - 1, "with" if self.at_prompt else "without"
        return f"decoding steps {self.start} to {end} {how} the last prompt position"

    def check(self, job: Job) -> None:
        """Raise ValueError for a window in which some prompt can have no step."""
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"steps: expected 0 <= start < stop (or stop None for the end of the reply), got ({self.start}, {self.stop})")
        first = self.start if self.start > 0 or self.at_prompt else 1
        short = [prompt.id for prompt, limit in zip(job.prompts, job.limits, strict=True) if limit <= first]
        if short or (self.stop is not None and self.stop <= first):
            raise ValueError(
                f"the patch window begins at decoding step {first}, with which nothing is left to patch for {short[:3] or 'any prompt'}: "
                "raise max_new_tokens, choose an earlier start or a later stop, or patch the last prompt position (step 0)"
            )


def _patched(
    job: Job, source: PatchEndpoint, target: PatchEndpoint, group: tuple[str, ...], window: Window, size: int, progress: bool
) -> tuple[list[Generation], list[int]]:
    """Replies with one group of sites patched, and how many steps of each were. Raises HookNotFired if none was."""
    lockstep = Lockstep(
        source=source,
        target=target,
        sites=group,
        start=max(window.start, 0 if window.at_prompt else 1),
        stop=max(job.limits) if window.stop is None else window.stop,
        n_steps=max(job.limits),
        patched=np.zeros(len(job.prompts), np.int64),
    )
    ((_, generations),) = run_job(replace(job, decoder_type=partial(LockstepDecoder, lockstep=lockstep)), size, progress=progress)
    if not lockstep.patched.any():
        raise HookNotFired(f"every reply ended before the window of {window}: nothing was patched. Choose an earlier window")
    return generations, lockstep.patched.tolist()


@dataclass(frozen=True, kw_only=True, eq=False)
class Lockstep:
    """A decode patch: endpoints, sites and steps. n_steps: of the longest reply.  patched: the number of patched steps per prompt."""

    source: PatchEndpoint
    target: PatchEndpoint
    sites: tuple[str, ...]
    start: int
    stop: int
    n_steps: int
    patched: np.ndarray

    @property
    def plan(self) -> Plan:
        """The part of the target that runs at a generated token."""
        if self.start <= 1 and self.stop >= self.n_steps:
            return plan_steps(self.target.model, self.sites)
        return Plan(first=0, enter=None, hooked=self.sites)


class LockstepDecoder(Decoder):
    """A decoder whose cache has a twin for the source: each step runs the source up to the last site, then the target with its states."""

    def __init__(self, *args: Any, lockstep: Lockstep, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lockstep, self.plan, self.twin = lockstep, lockstep.plan, self.cache.twin()
        source = lockstep.source.model
        self.source_stop = stop_layer(source, lockstep.sites) or source.cfg.n_layers
        self.states: dict[str, Tensor] = {}
        self.where = torch.zeros(0)
        self.taking = False

    def attached(self, hooks: Sequence[Hook]) -> AbstractContextManager[Any]:
        """The given hooks and the patches on the target; on the source, what takes its states. They may be one model."""
        both = ExitStack()
        both.enter_context(
            self.lockstep.source.model.hooks(fwd_hooks=[(site, partial(self._take_state, site)) for site in self.lockstep.sites])
        )
        both.enter_context(super().attached(hooks))
        return both

    def hooks(self) -> list[Hook]:
        """The patches at the sites that run, which are not those of blocks that nothing sees."""
        live = self.lockstep.sites if self.plan.enter is None else (self.plan.enter, *self.plan.hooked)
        return [(site, partial(self._patch, site)) for site in live]

    def _take_state(self, site: str, activation: Tensor, hook: HookPoint) -> None:
        if self.taking:
            self.states[site] = activation

    def _patch(self, site: str, activation: Tensor, hook: HookPoint) -> Tensor | None:
        if self.taking:
            return None
        return torch.where(self.where[:, :, None], self.states[site].to(activation), activation)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *, is_prompt: bool) -> Float[Tensor, "batch d_vocab"]:
        lockstep, made = self.lockstep, self.made[self.running]
        patched = (made >= lockstep.start) & (made < lockstep.stop)
        self._count(patched, is_prompt)
        self.where = torch.zeros_like(ids, dtype=torch.bool)
        self.where[:, -1] = torch.as_tensor(patched, device=ids.device)
        self._run_source(input_ids=ids, attention_mask=mask, position_ids=positions)
        with ExitStack() as running:
            running.enter_context(lockstep.target.acting())
            if self.plan.enter is not None and not is_prompt:
                running.enter_context(start_at_block(self.model, self.plan.first, self.states[self.plan.enter]))
            return super()._forward(ids, mask, positions, is_prompt=is_prompt)

    def _run_source(self, **inputs: Tensor) -> None:
        self.taking = True
        try:
            with self.lockstep.source.acting():
                run_until_block(self.lockstep.source.model, self.source_stop, **inputs, past_key_values=self.twin, use_cache=True)
        finally:
            self.taking = False

    def _count(self, patched: np.ndarray, is_prompt: bool) -> None:
        prompts = [row.prompt_index for row in self.rows[self.running]]
        if is_prompt:  # after a batch that did not fit into memory, rows begin again
            self.lockstep.patched[prompts] = 0
        self.lockstep.patched[prompts] += patched
