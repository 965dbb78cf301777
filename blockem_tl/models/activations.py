"""Teacher-forced reading: activations at a site over many rows, in batches, with the forward stopped just above the site."""

import re
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded, check_lengths, pad
from blockem_tl.hooks import record
from blockem_tl.models.load import Model

_BLOCK = re.compile(r"blocks\.(\d+)\.")


def block_of(site: str) -> int | None:
    """The block index in a hook name, or None for a site outside the blocks (embedding, final norm)."""
    found = _BLOCK.match(site)
    return int(found.group(1)) if found else None


def stop_layer(model: Model, sites: Sequence[str]) -> int | None:
    """The ``stop_at_layer`` that still reaches every site, or None where the whole model must run."""
    blocks = [block_of(site) for site in sites]
    if any(block is None for block in blocks):
        return None
    stop = max(block for block in blocks if block is not None) + 1
    return stop if stop < model.cfg.n_layers else None


@torch.no_grad()
def read_sites(
    model: Model, sites: Sequence[str], rows: Sequence[Encoded], *, batch_size: int = 32
) -> Iterator[tuple[dict[str, Float[Tensor, "batch pos d_model"]], Batch]]:
    """Yield (site -> activation, batch) over ``rows`` in order, right-padded, from one forward per batch.

    Each batch is read by the model as it stands when the batch is asked for.

    Raises:
        ValueError: an unknown site, a row longer than the model's context, or an SAE left attached.
    """
    model.check_unspliced()
    check_lengths(rows, model.cfg.n_ctx)
    stop = stop_layer(model, sites)
    for start in range(0, len(rows), batch_size):
        batch = pad(rows[start : start + batch_size], model.pad_id, side="right", device=model.device)
        store: dict[str, Tensor] = {}
        hooks = [record(site, store) for site in sites]
        model.run_with_hooks(batch.ids, fwd_hooks=hooks, attention_mask=batch.mask.long(), stop_at_layer=stop)
        yield store, batch


def read_site(
    model: Model, site: str, rows: Sequence[Encoded], *, batch_size: int = 32
) -> Iterator[tuple[Float[Tensor, "batch pos d_model"], Batch]]:
    """`read_sites` for one site: yield (activation, batch)."""
    for states, batch in read_sites(model, [site], rows, batch_size=batch_size):
        yield states[site], batch


@torch.no_grad()
def base_activations(model: Model, batch: Batch, sites: Sequence[str]) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """Base's activations at ``sites`` on a batch: adapter and dropout off, no gradient, the forward stopped above the last site.

    What a defence anchors to; it may be called in the middle of training. Raises ValueError for an unknown site.
    """
    store: dict[str, Tensor] = {}
    training = model.original_model.training
    model.original_model.eval()
    try:
        with model.using("base"):
            model.run_with_hooks(
                batch.ids,
                fwd_hooks=[record(site, store) for site in sites],
                attention_mask=batch.mask.long(),
                stop_at_layer=stop_layer(model, sites),
            )
    finally:
        model.original_model.train(training)
    return store


@torch.no_grad()
def median_norm(model: Model, site: str, rows: Sequence[Encoded], *, batch_size: int = 32) -> float:
    """s: median over tokens of |h_t| at ``site``, without those before the question (template, system message). Doses are multiples of it.

    The model is read as it stands; wrap the call in ``with model.using("base"):`` for the paper's scale (the base model's).
    """
    norms = [h[batch.mask & ~batch.system].float().norm(dim=-1) for h, batch in read_site(model, site, rows, batch_size=batch_size)]
    return float(torch.cat(norms).median())
