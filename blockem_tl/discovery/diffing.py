"""Stage 1, model diffing: the latents that fine-tuning moves (paper 3.1 and A.2)."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Encoded, Rows
from blockem_tl.models.activations import AnyModel, acting, read_site
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latents import encode_all
from blockem_tl.saes.load import check_fits
from blockem_tl.types import Candidate

MOST_ROWS = 16
"""Rows per forward, if nobody says how many: the SAE encodes them one by one."""


@torch.no_grad()
def mean_activations(
    model: AnyModel, sae: SAE[Any], rows: Rows | Sequence[Encoded], *, keep_system: bool = False, batch_size: int | None = None
) -> Float[Tensor, "n_rows d_sae"]:
    """z-bar_k(x): each latent's mean over the tokens of each row (eq. 3), template and system tokens left out unless ``keep_system``.

    Raises:
        ValueError: an SAE that does not fit the model, or a row longer than the context.
    """
    site = check_fits(sae, model)
    means = []
    for activations, batch in read_site(model, site, rows, batch_size=batch_size or MOST_ROWS):
        where = batch.mask if keep_system else batch.mask & ~batch.system
        for row, tokens in zip(activations, where, strict=True):  # one row at a time: [pos, 65536] fits, a batch of them may not
            means.append(encode_all(sae, row[tokens]).float().mean(0).cpu())
    return torch.stack(means)


def shifts(
    model: AnyModel,
    sae: SAE[Any],
    rows: Rows | Sequence[Encoded],
    *,
    base: AnyModel | None = None,
    keep_system: bool = False,
    batch_size: int | None = None,
) -> Float[Tensor, " d_sae"]:
    """Delta_k: mean over rows of z-bar_k under the tuned model minus under base (eq. 4). Both arms are the same code on the same tokens.

    Args:
        rows: the core prompts (the paper's choice), or the prompts with the tuned model's replies.
        base: the base model; None: ``model`` with its adapter off.

    Raises:
        ValueError: no base model, and a model without an adapter, whose two arms would be one.
    """
    if base is None and (not isinstance(model, Model) or model.active_adapter is None):
        raise ValueError(
            f"shifts: expected a model with an active adapter (load_model, load_adapter), got {type(model).__name__} without one: its two "
            "arms would be one. Pass the base model as base=..."
        )
    options = {"keep_system": keep_system, "batch_size": batch_size}
    tuned = mean_activations(model, sae, rows, **options)
    with nullcontext() if base is not None else acting(model, BASE):
        before = mean_activations(base or model, sae, rows, **options)
    return (tuned - before).mean(0)


def candidate_pool(shift: Float[Tensor, " d_sae"], *, n_plus: int = 250, n_minus: int = 250) -> list[Candidate]:
    """C = C+ u C-: the ``n_plus`` largest positive and ``n_minus`` most negative shifts (eq. 5), strongest first within each side.

    Fewer where fewer latents moved in that direction; zero shifts are never candidates. Raises ValueError for shifts that are not finite.
    """
    if not torch.isfinite(shift).all():
        raise ValueError(
            f"candidates: expected finite shifts, got NaN or infinity at latents {(~torch.isfinite(shift)).nonzero()[:5, 0].tolist()}"
        )
    order = torch.argsort(shift, descending=True, stable=True).tolist()
    plus = [k for k in order[:n_plus] if shift[k] > 0]
    minus = [k for k in order[::-1][:n_minus] if shift[k] < 0]
    return [Candidate(latent=k, shift=float(shift[k])) for k in [*plus, *minus]]
