"""Prefix-only patching: the states of the prompt's tokens at a site become another model's, then the reply is generated unpatched.

Section 5 and F.1 of the paper (experiment 1), for all sites in one stream. With h the residual stream after block s::

    source    embed - 0 - 1 - ... - s - h        once for all sites
                                        |
    target    embed - 0 - 1 - ... - s - h - s+1 - ... - logits
              once for all sites            once per site

The keys and values of blocks 0 to s stay the target's: only h is replaced. So the target's prompt is prefilled once, its keys and values
are copied for every site, and only the blocks above s run again. Rows of all sites then decode together.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from blockem_tl.batch_size import fitting
from blockem_tl.conditions import Condition
from blockem_tl.decoding import Decoder
from blockem_tl.generation import PREFILL_TOKENS, PREFILL_TOKENS_ON_CPU, Job, make_job, run_job
from blockem_tl.hooks import patch, record
from blockem_tl.kv_slots import SlotCache
from blockem_tl.models import Model
from blockem_tl.patching.arms import BASE, Arm, Plan, Sites, check_groups, choose_arms, plan_prompt
from blockem_tl.patching.spans import entering, run_below, short_top
from blockem_tl.prompts import Batch, Encoded, pad
from blockem_tl.reading import block_of, stop_layer
from blockem_tl.types import Generation, Prompt

UNPATCHED = "unpatched"
SHARED_TOKENS = 16384
"""Prompt tokens, padding included, whose states, keys and values are kept for all sites at once."""


def patching_sweep(
    model: Model,
    prompts: Sequence[Prompt],
    sites: Sequence[str | Sequence[str]],
    *,
    source: str | Model = BASE,
    target: str | None = None,
    max_new_tokens: int | Sequence[int] = 64,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[tuple[Sites, list[Generation]]]:
    """Yield (site, replies in prompt order) for each site as it finishes: h over the prompt <- source's, the reply unpatched.

    Args:
        sites: a hook name each, or a tuple of names that are patched together; () gives the target's own replies, for comparison.
            ``blocks.N.hook_resid_post`` is the paper's sweep; components are ``blocks.N.hook_attn_out`` and ``blocks.N.hook_mlp_out``.
        source: whose states: "base", an adapter's name, or another model (as it stands), e.g. one that was fully fine-tuned.
        target: who is patched and speaks: "base" or an adapter's name; None is the model as it stands. ``source="tuned",
            target="base"`` is the reverse direction.
        batch_size: rows that run at once; None asks the free memory.
        max_new_tokens, temperature, seed: as for :func:`blockem_tl.generation.generate_stream`.

    Raises:
        ValueError: source equal to target, models that do not share their tokens, a site that one of them lacks or that is not
            [batch pos d_model], or bad prompts; before any work.
    """
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in sites]
    taken, speaker = choose_arms(model, source, target)
    check_groups((taken, speaker), groups)
    conditions = [Condition(name=_name(taken, speaker, group)) for group in groups]
    job = make_job(model, prompts, conditions, (), max_new_tokens, temperature, seed)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected batch_size >= 1 or None, got {batch_size}")
    plans = [plan_prompt(model, group) if group else None for group in groups]
    keys = [site if isinstance(site, str) else tuple(site) for site in sites]
    return _sweep(job, keys, plans, taken, speaker, batch_size or fitting(model, job.longest), progress)


def _name(source: Arm, target: Arm, group: tuple[str, ...]) -> str:
    return f"{source.name} into {target.name} over the prompt at {' + '.join(group)}" if group else UNPATCHED


def _sweep(
    job: Job, sites: list[Sites], plans: list[Plan | None], source: Arm, target: Arm, size: int, progress: bool
) -> Iterator[tuple[Sites, list[Generation]]]:
    """Part of the prompts after part, so that what is shared between sites fits into memory; usually there is one part."""
    found: list[dict[int, Generation]] = [{} for _ in sites]
    with tqdm(total=len(sites) * len(job.prompts), desc="patched replies", disable=not progress) as bar:
        for chosen in _parts(job.encoded, size):
            encoded = [job.encoded[i] for i in chosen]
            part = replace(
                job,
                prompts=[job.prompts[i] for i in chosen],
                encoded=encoded,
                limits=[job.limits[i] for i in chosen],
                decoder_type=partial(PrefixDecoder, plans=plans, shared=share(encoded, plans, source, target)),
                prefill_order=lambda row: row.place,  # site by site
            )
            for c, replies in run_job(part, size, target.speaking, progress=False):
                found[c] |= dict(zip(chosen, replies, strict=True))
                bar.update(len(replies))
                if len(found[c]) == len(job.prompts):
                    yield sites[c], [found[c][i] for i in range(len(job.prompts))]


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
    """What one prefill of each arm left: states by site, and the target's keys and values [batch n_heads pos d_head] by layer.

    The prompts are padded on the left. source: at every site that is patched.  own: the target's, where a part of it begins.
    """

    n_prompts: int
    source: dict[str, Float[Tensor, "batch pos d_model"]]
    own: dict[str, Float[Tensor, "batch pos d_model"]]
    keys: list[Tensor]
    values: list[Tensor]


@torch.no_grad()
def share(rows: Sequence[Encoded], plans: Sequence[Plan | None], source: Arm, target: Arm) -> Shared:
    """Prefill both arms once, each only as far up as any plan asks for."""
    asked = [plan for plan in plans if plan is not None]
    patched = dict.fromkeys(site for plan in asked for site in (plan.enter, *plan.hooked) if site is not None)
    begun = dict.fromkeys(plan.entered_at for plan in asked if plan.enter is None and plan.first > 0)
    top = max((plan.first for plan in asked), default=0)
    batch = pad(rows, target.model.pad_id, side="left", device=target.model.device)
    stop = stop_layer(source.model, list(patched)) or source.model.cfg.n_layers
    taken = _prefill(source, batch, list(patched), stop, None) if patched else {}
    if top == 0:
        return Shared(n_prompts=len(rows), source=taken, own={}, keys=[], values=[])
    cache = SlotCache(len(rows), batch.ids.shape[1])
    own = _prefill(target, batch, list(begun), top, cache)
    kept: list[Any] = cache.layers[:top]
    keys, values = ([stored[:, :, : cache.end] for stored in tensors] for tensors in zip(*((k.keys, k.values) for k in kept), strict=True))
    return Shared(n_prompts=len(rows), source=taken, own=own, keys=keys, values=values)


def _prefill(arm: Arm, batch: Batch, sites: list[str], stop: int, cache: SlotCache | None) -> dict[str, Tensor]:
    """The states at the sites, from the blocks below ``stop``; keys and values go to the cache. As many rows at once as still help."""
    model, (n_rows, width), found = arm.model, batch.ids.shape, list[dict[str, Tensor]]()
    at_once = max(1, (PREFILL_TOKENS_ON_CPU if model.device.type == "cpu" else PREFILL_TOKENS) // width)
    for start in range(0, n_rows, at_once):
        some, store = slice(start, min(start + at_once, n_rows)), dict[str, Tensor]()
        if cache is not None:
            cache.expect_newcomers(start, some.stop - start, width, width)
        inputs: dict[str, Any] = {"past_key_values": cache, "use_cache": cache is not None}
        short = short_top(model) if cache is not None else nullcontext()  # what is recorded of the target lies below its last block
        with arm.speaking(), model.hooks(fwd_hooks=[record(site, store) for site in sites]), short:
            run_below(model, stop, input_ids=batch.ids[some], attention_mask=batch.mask[some], position_ids=batch.positions[some], **inputs)
        found.append(store)
    return {site: torch.cat([store[site] for store in found]) for site in sites}


# ------------------------------------------------------------------------------------------------ rows of all sites in one batch


class PrefixDecoder(Decoder):
    """A decoder whose rows are prefilled from what sites share: row ``place`` is prompt ``place % n_prompts`` under that plan."""

    def __init__(self, *args: Any, plans: Sequence[Plan | None], shared: Shared, **options: Any) -> None:
        super().__init__(*args, **options)
        self.plans, self.shared = plans, shared

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, *, is_prompt: bool) -> Float[Tensor, "batch d_vocab"]:
        if not is_prompt:
            return super()._forward(ids, mask, positions, is_prompt=False)
        newcomers, n_prompts, logits = self.rows[self.running], self.shared.n_prompts, []
        for c, group in groupby(range(len(newcomers)), key=lambda i: newcomers[i].place // n_prompts):
            members = list(group)
            part = slice(members[0], members[-1] + 1)
            self.cache.window.rows = slice(self.running.start + part.start, self.running.start + part.stop)
            chosen = torch.tensor([newcomers[i].place % n_prompts for i in members])
            logits.append(self._prefill(self.plans[c], chosen, ids[part], mask[part], positions[part]))
        return torch.cat(logits)

    def _prefill(self, plan: Plan | None, chosen: Tensor, ids: Tensor, mask: Tensor, positions: Tensor) -> Float[Tensor, "batch d_vocab"]:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        if plan is None:
            return self.forward(**inputs)
        shared, width = self.shared, ids.shape[1]
        for layer in range(plan.first):
            keys, values = (stored[layer][chosen, :, -width:] for stored in (shared.keys, shared.values))
            self.cache.update(keys, values, layer)
        states = {site: shared.source[site][chosen, -width:] for site in plan.hooked}
        with ExitStack() as running:
            if all(block_of(site) != self.model.cfg.n_layers - 1 for site in plan.hooked):
                running.enter_context(short_top(self.model))
            if plan.hooked:
                running.enter_context(self.model.hooks(fwd_hooks=[patch(site, state) for site, state in states.items()]))
            if plan.first > 0:
                enters = shared.source[plan.enter] if plan.enter is not None else shared.own[plan.entered_at]
                running.enter_context(entering(self.model, plan.first, enters[chosen, -width:].to(self.model.device, self.model.cfg.dtype)))
            return self.forward(**inputs)
