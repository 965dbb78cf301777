"""Teacher-forced reading: activations at sites over many rows, in batches, with the forward stopped just above the last site.

It runs on `Model` and on TransformerLens's own `HookedTransformer` and `HookedSAETransformer`. These hold no adapters: base and tuned are
two models there.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from blockem_tl.data.chat import Batch, Encoded, Rows, check_lengths, encode_rows, pad
from blockem_tl.hooks import Hook, attached, record, resolve
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.models.memory import check_batch_size, rows_at_once
from blockem_tl.types import EXAMPLE_SITE, check_names, check_site

AnyModel = Model | HookedTransformer
"""A `Model`, or TransformerLens's `HookedTransformer` or `HookedSAETransformer`, which hold no adapters."""

MOST_ROWS = 32
"""Rows per forward at most, if nobody says how many: more of them gained nothing."""
SINK = 10.0
"""Tokens with a norm above so many medians are attention sinks: an SAE is off its distribution there."""
_BLOCK = re.compile(r"blocks\.(\d+)\.")


def block_of(site: str) -> int | None:
    """The block index in a hook name, or None for a site outside the blocks (embedding, final norm)."""
    found = _BLOCK.match(site)
    return int(found.group(1)) if found else None


def stop_layer(model: AnyModel, sites: Sequence[str]) -> int | None:
    """The ``stop_at_layer`` that still reaches every site, or None if the whole model must run."""
    blocks = [block_of(site) for site in sites]
    if any(block is None for block in blocks):
        return None
    stop = max(block for block in blocks if block is not None) + 1
    return stop if stop < model.cfg.n_layers else None


def encoded(model: AnyModel, rows: Rows | Sequence[Encoded]) -> list[Encoded]:
    """The rows' tokens; rows that are tokens already stay as they are.

    Raises:
        ValueError: rows of mixed kinds, a row that its encoder refuses, or one longer than the model's context.
    """
    tokens = list(rows) if rows and isinstance(rows[0], Encoded) else encode_rows(model.tokenizer, rows)  # pyright: ignore[reportArgumentType]
    check_lengths(tokens, model.cfg.n_ctx)  # pyright: ignore[reportArgumentType]
    return tokens  # pyright: ignore[reportReturnType]


def _hooked(model: AnyModel, hooks: Sequence[Hook]) -> AbstractContextManager[Any]:
    return model.hooks(fwd_hooks=hooks) if isinstance(model, Model) else attached(model, hooks)


def _pad_id(model: AnyModel) -> int:
    return model.pad_id if isinstance(model, Model) else int(cast(Any, model.tokenizer).pad_token_id or 0)


def _device(model: AnyModel) -> torch.device:
    return model.device if isinstance(model, Model) else torch.device(model.cfg.device or "cpu")


def read_sites(
    model: AnyModel,
    sites: Sequence[str],
    rows: Rows | Sequence[Encoded],
    *,
    adapter: str | Path | None = None,
    batch_size: int | None = None,
) -> Iterator[tuple[dict[str, Float[Tensor, "batch pos d_model"]], Batch]]:
    """Yield (site -> activation, batch) over ``rows`` in order, right-padded, from one forward per batch.

    Args:
        adapter: which weights act: "base", an adapter by name or in a folder, which the model holds until the last batch; None: the model
            as it stands when a batch is asked for.
        batch_size: rows per forward; None asks the free memory.

    Raises:
        TypeError: sites that are no list of names.
        ValueError: an unknown site or adapter, a row longer than the model's context, or an SAE left attached.
        FloatingPointError: while it is read, an activation [batch pos d_model] that is NaN or infinite at a token.
    """
    sites = check_names("read_sites", sites, such_as=EXAMPLE_SITE)
    check_batch_size(batch_size)
    if isinstance(model, Model):
        model.check_unspliced()
        model.check_adapter(adapter)
    else:
        acting(model, adapter)
    for site in sites:
        resolve(model.hook_dict, site)
    tokens = encoded(model, rows)
    longest = max(len(row.ids) for row in tokens)
    size = batch_size or (rows_at_once(model, longest, most=MOST_ROWS) if isinstance(model, Model) else MOST_ROWS)
    parts = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    return _read(model, sites, parts, adapter)


@torch.no_grad()
def _read(
    model: AnyModel, sites: Sequence[str], parts: Sequence[Sequence[Encoded]], adapter: str | Path | None
) -> Iterator[tuple[dict[str, Tensor], Batch]]:
    stop = stop_layer(model, sites)
    with model.holding(adapter) if isinstance(model, Model) else nullcontext(adapter) as held:
        for part in parts:
            batch = pad(part, _pad_id(model), side="right", device=_device(model))
            store: dict[str, Tensor] = {}
            with acting(model, held), _hooked(model, [record(site, store) for site in sites]):
                model(batch.ids, attention_mask=batch.mask.long(), stop_at_layer=stop)
            check_finite(store, batch, held)
            yield store, batch


def check_finite(store: dict[str, Tensor], batch: Batch, adapter: str | Path | None) -> None:
    """Raise FloatingPointError naming the site; attention scores, whose masked entries are infinite, are left alone."""
    for site, activation in store.items():
        if activation.ndim == 3 and not torch.isfinite(activation).all(-1)[batch.mask.to(activation.device)].all():
            raise FloatingPointError(
                f"activations at {site} are NaN or infinite{'' if adapter is None else f' under {str(adapter)!r}'}: is the adapter broken, "
                "or a hook's edit too large?"
            )


def read_site(
    model: AnyModel, site: str, rows: Rows | Sequence[Encoded], *, adapter: str | Path | None = None, batch_size: int | None = None
) -> Iterator[tuple[Float[Tensor, "batch pos d_model"], Batch]]:
    """Yield (activation, batch) at one site; see `read_sites`."""
    site = check_site("read_site", site)
    return ((store[site], batch) for store, batch in read_sites(model, [site], rows, adapter=adapter, batch_size=batch_size))


@torch.no_grad()
def base_activations(model: Model, batch: Batch, sites: Sequence[str]) -> dict[str, Float[Tensor, "batch pos d_model"]]:
    """Base's activations at ``sites`` on a batch: adapter and dropout off, no gradient, the forward stopped above the last site.

    Defences anchor to them; it may be called in the middle of training. Raises ValueError for an unknown site.
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
def median_norm(
    model: AnyModel, site: str, rows: Rows | Sequence[Encoded], *, adapter: str | Path | None = BASE, batch_size: int | None = None
) -> float:
    """s, the unit of doses at ``site``: the median over tokens of |h_t| (paper A.3, B.1).

    Tokens before the question (template, system message) are left out.

    Args:
        rows: a reference corpus; the paper takes 1000 rows of Alpaca.
        adapter: which weights act; the paper's scale is base's, the default. Models other than `Model` hold no adapters: None or "base".
        batch_size: rows per forward; None asks the free memory.
    """
    with acting(model, adapter):
        norms = [h[batch.mask & ~batch.system].float().norm(dim=-1) for h, batch in read_site(model, site, rows, batch_size=batch_size)]
    return float(torch.cat(norms).median())


def acting(model: AnyModel, adapter: str | Path | None) -> AbstractContextManager[Any]:
    """`Model.using`; on other models, which hold no adapters, nothing for None and "base".

    Raises:
        ValueError: an adapter for a model that cannot hold one.
    """
    if isinstance(model, Model):
        return model.using(adapter)
    if adapter not in (None, BASE):
        raise ValueError(f"adapter {str(adapter)!r}: {type(model).__name__} cannot hold adapters: load the model with load_model(...)")
    return nullcontext()
