"""Prompt patching: the states of the prompt's tokens at a site become another model's, then the reply is generated unpatched.

Section 5 and F.1 of the paper (experiment 1), for all sites in one stream. With h the residual stream after block s::

    source    embed - 0 - 1 - ... - s - h        once for all sites
                                        |
    target    embed - 0 - 1 - ... - s - h - s+1 - ... - logits
              once for all sites            once per site

The keys and values of blocks 0 to s stay the target's: only h is replaced. So the target's prompt is prefilled once, its keys and values
are copied for every site, and only the blocks above s run again. Rows of all sites then decode together.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.analysis.patching.endpoints import UNPATCHED, PatchEndpoint, Plan, check_groups, choose_endpoints, holding, plan_prompt
from blockem_tl.data.chat import Encoded, pad
from blockem_tl.generation._decoder import Decoder
from blockem_tl.generation._partial_forward import start_at_block
from blockem_tl.generation._scheduler import Job, fitting, make_job, run_job
from blockem_tl.generation._shared_prefill import SHARED_TOKENS, Prefilled, prefill, row_index, stream_into
from blockem_tl.generation.steering import Condition
from blockem_tl.hooks import patch
from blockem_tl.models.activations import stop_layer
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.types import Generation, Prompt
from blockem_tl.views.progress import progress_bar


def prompt_patching_stream(
    model: Model,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[str]],
    *,
    source: str | Path | Model = BASE,
    target: str | Path | None = None,
    max_new_tokens: int | Sequence[int] = 64,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[tuple[str, ...], list[Generation]]]:
    """Yield (group of sites, replies in prompt order) for each group as it finishes: h over the prompt <- source's, the reply unpatched.

    Args:
        groups: sites that are patched together; () gives the target's own replies, for comparison.
        source, target, max_new_tokens, batch_size, temperature, seed: as for `patching_sweep`.

    Raises:
        ValueError: what `patching_sweep` refuses; before any work.
    """
    chosen = [tuple(group) for group in groups]
    taken, into = choose_endpoints(model, source, target)
    check_groups((taken, into), chosen)
    conditions = [Condition(name=_name(taken, into, group)) for group in chosen]
    job = make_job(model, prompts, conditions, (), max_new_tokens, temperature, seed)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected batch_size >= 1 or None, got {batch_size}")
    return _sweep(job, chosen, taken, into, batch_size or fitting(job), progress)


def _name(source: PatchEndpoint, target: PatchEndpoint, group: tuple[str, ...]) -> str:
    return f"{source.name} into {target.name} over the prompt at {' + '.join(group)}" if group else UNPATCHED


def _sweep(
    job: Job, groups: list[tuple[str, ...]], source: PatchEndpoint, target: PatchEndpoint, size: int, progress: bool
) -> Iterator[tuple[tuple[str, ...], list[Generation]]]:
    """Part of the prompts after part, so that what is shared between sites fits into memory; usually there is one part."""
    found: list[dict[int, Generation]] = [{} for _ in groups]
    plans = [plan_prompt(job.model, group) if group else None for group in groups]
    bar = progress_bar(total=len(groups) * len(job.prompts), desc="patched replies", show=progress)
    with bar, holding(source, target) as (taken, into):
        for chosen in _parts(job.encoded, size):
            encoded = [job.encoded[i] for i in chosen]
            part = replace(
                job,
                prompts=[job.prompts[i] for i in chosen],
                encoded=encoded,
                limits=[job.limits[i] for i in chosen],
                adapter=into.adapter,
                decoder_type=partial(PromptPatchDecoder, plans=plans, shared=share(encoded, plans, taken, into)),
                prefill_order=lambda row: row.index,  # site by site
            )
            for c, replies in run_job(part, size, progress=False):
                found[c] |= dict(zip(chosen, replies, strict=True))
                bar.update(len(replies))
                if len(found[c]) == len(job.prompts):
                    yield groups[c], [found[c][i] for i in range(len(job.prompts))]


def _parts(rows: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Indices of rows, equal lengths together, at most ``size`` and ``SHARED_TOKENS`` tokens at once (but at least one row)."""
    part: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        if part and (len(part) == size or len(rows[i].ids) * (len(part) + 1) > SHARED_TOKENS):
            yield part
            part = []
        part.append(i)
    yield part


# ------------------------------------------------------------------------------------------------ what sites share


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """States from one prefill of each endpoint. source: at every patched site.  target: at every block where a plan starts."""

    source: Prefilled
    target: Prefilled


def share(rows: Sequence[Encoded], plans: Sequence[Plan | None], source: PatchEndpoint, target: PatchEndpoint) -> Shared:
    """Prefill both endpoints once, each only as far up as any plan asks for."""
    asked = [plan for plan in plans if plan is not None]
    patched = list(dict.fromkeys(site for plan in asked for site in (plan.enter, *plan.hooked) if site is not None))
    begun = list(dict.fromkeys(stream_into(plan.first) for plan in asked if plan.enter is None and plan.first > 0))
    top = max((plan.first for plan in asked), default=0)
    batch = pad(rows, target.model.pad_id, side="left", device=target.model.device)
    with source.acting():
        theirs = Prefilled(states={})
        if patched:
            stop = stop_layer(source.model, patched) or source.model.cfg.n_layers
            theirs = prefill(source.model, batch, patched, stop, keep=False)
    with target.acting():
        own = prefill(target.model, batch, begun, top, keep=True) if top else Prefilled(states={})
    return Shared(source=theirs, target=own)


# ------------------------------------------------------------------------------------------------ rows of all sites in one batch


class PromptPatchDecoder(Decoder):
    """A decoder whose rows are prefilled from what sites share; a row's condition says which plan is its."""

    def __init__(self, *args: Any, plans: Sequence[Plan | None], shared: Shared, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plans, self.shared = plans, shared

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *, is_prompt: bool) -> Float[Tensor, "batch d_vocab"]:
        if not is_prompt:
            return super()._forward(ids, mask, positions, is_prompt=False)
        newcomers, logits = self.rows[self.running], []
        for c, group in groupby(range(len(newcomers)), key=lambda i: newcomers[i].condition_index):
            members = list(group)
            part = slice(members[0], members[-1] + 1)
            self.cache.window.rows = slice(self.running.start + part.start, self.running.start + part.stop)
            chosen = row_index([newcomers[i].prompt_index for i in members], self.model.device)
            logits.append(self._prefill(self.plans[c], chosen, ids[part], mask[part], positions[part]))
        return torch.cat(logits)

    def _prefill(
        self, plan: Plan | None, chosen: Tensor | slice, ids: Tensor, mask: Tensor, positions: Tensor
    ) -> Float[Tensor, "batch d_vocab"]:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        if plan is None:
            return self.forward(**inputs)
        shared, width = self.shared, ids.shape[1]
        shared.target.fill(self.cache, plan.first, chosen, width)
        states = {site: shared.source.states[site][chosen, -width:] for site in plan.hooked}
        with ExitStack() as running:
            if plan.hooked:
                running.enter_context(self.model.hooks(fwd_hooks=[patch(site, state) for site, state in states.items()]))
            if plan.first > 0:
                enters = shared.source.states[plan.enter] if plan.enter is not None else shared.target.states[stream_into(plan.first)]
                running.enter_context(
                    start_at_block(self.model, plan.first, enters[chosen, -width:].to(self.model.device, self.model.cfg.dtype))
                )
            return self.forward(**inputs)
