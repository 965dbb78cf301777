"""The patching sweep without generation and judge: another model's states at site after site, measured by contrastive pairs::

    swept = pair_patching(model, pairs, target="tuned")  # every block's output; over the prompt, then over the answer
    swept.shift(preference(model, pairs, adapter="base"))

Both answers of a pair are teacher-forced, so a site takes as many forwards as there are answers, and none of the blocks below it: two
orders of magnitude less than judged replies. "prompt" patches what `patching_sweep` patches there. "decode" patches the answer's tokens,
as decode patching does after its first step; here the answer is given, while decode patching lets the patched model write.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.analysis._from_site import reply_nats
from blockem_tl.analysis.patching.endpoints import UNPATCHED, PatchEndpoint, check_groups, choose_endpoints, holding
from blockem_tl.analysis.patching.sweep import When, checked_sweep
from blockem_tl.data.chat import Batch, check_lengths, encode_examples, pad
from blockem_tl.data.pair_files import check_pairs
from blockem_tl.evaluation.preference import MOST_ROWS, Preference, sides
from blockem_tl.models.activations import stop_layer
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.models.memory import check_batch_size, rows_at_once
from blockem_tl.types import Pair
from blockem_tl.views.progress import progress_bar


def pair_patching(
    model: Model,
    pairs: Sequence[Pair],
    sites: Sequence[str] | None = None,
    *,
    when: When | Sequence[When] = ("prompt", "decode"),
    source: str | Path | Model = BASE,
    target: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Preference:
    """Margins of the target with source's states patched in: conditions "unpatched", then "prompt, SITE" and "decode, SITE".

    Args:
        sites: [batch pos d_model] hook names, patched one after the other; None: ``hook_resid_post`` of every block.
        when: "prompt": all tokens before the answer, the template's too.  "decode": the answer's.
        source, target: as for `patching_sweep`.
        batch_size: answers per forward; None asks the free memory.

    Raises:
        ValueError: pairs that `check_pairs` refuses, or what `patching_sweep` refuses; before any work.
    """
    chosen, kinds = checked_sweep(model, sites, (), when)
    names = [site for (site,) in chosen]
    check_pairs(pairs)
    check_batch_size(batch_size)
    ends = choose_endpoints(model, source, target)
    check_groups(ends, chosen)
    encoded = encode_examples(model.tokenizer, sides(pairs))
    check_lengths(encoded, model.cfg.n_ctx)
    size = batch_size or rows_at_once(model, max(len(row.ids) for row in encoded), most=MOST_ROWS)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))  # equal lengths together: less padding
    conditions = [UNPATCHED, *(f"{kind}, {site}" for kind in kinds for site in names)]
    found = np.zeros((len(conditions), len(encoded)))
    with holding(*ends) as (theirs, own), progress_bar(total=found.size, desc="patching", show=progress) as bar:
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            batch = pad([encoded[i] for i in rows], model.pad_id, side="right", device=model.device)
            for c, nats in enumerate(_of_batch(batch, names, kinds, theirs, own)):
                found[c, rows] = nats
                bar.update(len(rows))
    if not np.isfinite(found).all():
        raise FloatingPointError("patching: logits are NaN or infinite: a broken adapter?")
    harmful, helpful = found[:, : len(pairs)], found[:, len(pairs) :]
    return Preference(pairs=tuple(pairs), conditions=tuple(conditions), harmful=harmful, helpful=helpful)


def _of_batch(batch: Batch, sites: Sequence[str], kinds: Sequence[When], source: PatchEndpoint, target: PatchEndpoint) -> Any:
    """Yield [batch] nats per condition: unpatched first."""
    theirs, own = _states(batch, sites, source), _states(batch, sites, target)
    where = {"prompt": batch.mask & ~batch.reply, "decode": batch.reply}
    with target.acting():
        yield reply_nats(target.model, batch, sites[0], own[sites[0]])
        for kind in kinds:
            for site in sites:
                mixed = torch.where(where[kind][..., None].to(own[site].device), theirs[site].to(own[site]), own[site])
                yield reply_nats(target.model, batch, site, cast(Float[Tensor, "batch pos d_model"], mixed))


@torch.no_grad()
def _states(batch: Batch, sites: Sequence[str], end: PatchEndpoint) -> dict[str, Tensor]:
    """[batch pos d_model] at each site."""
    with end.model.recording(list(sites)) as store, end.acting():
        end.model(batch.ids, attention_mask=batch.mask.long(), stop_at_layer=stop_layer(end.model, list(sites)))
    return dict(store)
