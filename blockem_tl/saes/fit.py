"""The fit of an SAE to a model: its reconstruction of base's activations, and a warning for one that explains little of them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl.models.activations import Rows, read_site
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.load import HELD_OUT, check_fits

LEAST_EXPLAINED = 0.5
"""Below this share of the variance an SAE is probably another model's, or the model is loaded in another way than it was trained on."""


@torch.no_grad()
def reconstruct(sae: SAE[Any], activations: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
    """The SAE's reconstruction of activations, in the model's own units and the activations' dtype.

    An SAE that scales its input when it runs (SAELens's ``layer_norm`` and ``constant_norm_rescale``) keeps the tokens' scales between
    encode and decode and undoes them, so both run on the same tokens, one right after the other.

    Raises:
        FloatingPointError: a reconstruction that is NaN or infinite.
    """
    found = sae.decode(sae.encode(activations.to(sae.W_dec))).to(activations)
    if not torch.isfinite(found).all():
        raise FloatingPointError(f"SAE at {sae.cfg.metadata.hook_name}: its reconstruction is NaN or infinite: are its weights whole?")
    return found


@torch.no_grad()
def explained_variance(model: Model, sae: SAE[Any], rows: Rows, *, adapter: str | Path | None = BASE) -> float:
    """The share of the variance of the activations at the SAE's site that it gives back, over all tokens but system ones.

    ``adapter`` says which weights act, as everywhere; an SAE is judged on base, the default.
    `analysis.reconstruction.reconstruction_quality` has more numbers, for any adapters. Raises ValueError for an SAE that does not fit.
    """
    site = check_fits(sae, model)
    read, given_back = [], []
    for activations, batch in read_site(model, site, rows, adapter=adapter):
        for row, kept in zip(activations, batch.mask & ~batch.system, strict=True):  # the latents of a whole batch may not fit
            read.append(row[kept].float())
            given_back.append(reconstruct(sae, read[-1]))
    h = torch.cat(read)
    lost = (h - torch.cat(given_back)).square().sum() / (h - h.mean(0)).square().sum()
    return 1 - float(lost)


def warn_if_poor_fit(model: Model, sae: SAE[Any], rows: Rows, *, stacklevel: int) -> None:
    """Warn if the SAE explains less than half of the variance of base's activations on ``rows``, and say what its card says."""
    explained = explained_variance(model, sae, rows)
    if not explained >= LEAST_EXPLAINED:
        known = sae.cfg.metadata[HELD_OUT]
        card = "It has no card of its fit on rows held out" if known is None else f"On rows held out it explained {100 * known:.0f} %"
        warnings.warn(
            f"the SAE explains {100 * explained:.0f} % of the variance at {check_fits(sae, model)} on these prompts, expected at least "
            f"{100 * LEAST_EXPLAINED:.0f} %: its latents may mean nothing here. Is it this model's SAE, and is the model loaded as it was "
            f"trained on (unfolded, in the right dtype)? {card}; `blockem train-sae` trains one for any model and site",
            stacklevel=stacklevel + 1,
        )
