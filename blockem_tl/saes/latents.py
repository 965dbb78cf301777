"""Chosen latents of an SAE: their values, their decoder directions, and their pages on Neuronpedia."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

_COLUMNWISE = {"standard", "jumprelu", "gated"}  # a latent needs only its own column; TopK kinds compare all pre-activations


def norms(sae: SAE[Any], latents: Sequence[int]) -> dict[str, float]:
    """Median encoder and decoder norms of the latents: what a weight or a dose found with this SAE is relative to."""
    columns = list(latents)
    encoder, decoder = sae.W_enc.detach()[:, columns].float().norm(dim=0), sae.W_dec.detach()[columns].float().norm(dim=-1)
    return {"encoder": float(encoder.median()), "decoder": float(decoder.median())}


def neuronpedia_link(place: str | None, latent: int) -> str | None:
    """The latent's Neuronpedia page; ``place`` is the SAE's ``cfg.metadata.neuronpedia_id``, None where it has none."""
    return f"https://www.neuronpedia.org/{place}/{latent}" if place else None


def as_indices(latents: Any) -> list[int]:
    """Latents as a list of whole numbers, out of any sequence or tensor. Raises ValueError for a mask, fractions, or none at all."""
    values = latents.tolist() if hasattr(latents, "tolist") else list(latents)
    if not values or not all(isinstance(value, numbers.Integral) and not isinstance(value, bool) for value in values):
        raise ValueError(f"latents: expected indices, whole numbers, got {str(values)[:80]}; of a mask take mask.nonzero()")
    return [int(value) for value in values]


def check_latents(sae: SAE[Any], latents: Sequence[int]) -> None:
    """Raise ValueError unless every index is one of the SAE's latents."""
    bad = [k for k in latents if not 0 <= k < sae.cfg.d_sae]
    if bad:
        raise ValueError(f"latents: expected indices in 0..{sae.cfg.d_sae - 1} (the SAE's d_sae is {sae.cfg.d_sae}), got {bad[:5]}")


def decoder_directions(sae: SAE[Any], latents: Sequence[int]) -> Float[Tensor, "n_latents d_model"]:
    """Unit-norm decoder rows d_k / |d_k| of the chosen latents: the steering directions (paper A.3).

    Raises:
        ValueError: an index out of range, or a latent whose decoder row is zero or has no finite norm.
    """
    latents = as_indices(latents)
    check_latents(sae, latents)
    rows = sae.W_dec.detach()[latents].float()
    norms = rows.norm(dim=-1, keepdim=True)
    if (norms == 0).any():
        raise ValueError(
            f"latents {[k for k, n in zip(latents, norms[:, 0], strict=True) if n == 0]} have zero decoder rows: nothing to steer along"
        )
    if not torch.isfinite(norms).all():
        broken = [k for k, n in zip(latents, norms[:, 0], strict=True) if not torch.isfinite(n)]
        raise ValueError(f"latents {broken} have decoder rows of NaN, infinity or numbers too large for a norm: the SAE is broken")
    return rows / norms


def _check_finite(sae: SAE[Any], what: str, *values: Tensor) -> None:
    """Raise FloatingPointError naming the SAE's site unless all values are finite."""
    if not all(torch.isfinite(tensor).all() for tensor in values):
        raise FloatingPointError(
            f"SAE at {sae.cfg.metadata.hook_name}: {what} are NaN or infinite: are the activations finite, and the SAE's weights whole?"
        )


def encode_all(sae: SAE[Any], activations: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
    """z of all latents, dense, in the SAE's dtype. Raises FloatingPointError for activations or latents that are NaN or infinite."""
    _check_finite(sae, "its input activations", activations)  # ReLU would make latents of 0 out of minus infinity
    latents = sae.encode(activations.to(sae.W_dec))
    dense = latents.to_dense() if latents.is_sparse else latents
    _check_finite(sae, "its latents", dense)
    return dense


def encode_latents(
    sae: SAE[Any], activations: Float[Tensor, "*batch d_model"], latents: Sequence[int]
) -> Float[Tensor, "*batch n_latents"]:
    """z_k of the chosen latents, with exactly the values of the SAE's full encode, in the SAE's dtype; gradients flow to ``activations``.

    ReLU, JumpReLU and gated SAEs compute just those columns, as constants; every other kind (TopK, BatchTopK loaded as TopK, ...) runs its
    full encode, where parameters that require a gradient get one: freeze such an SAE first.

    Raises:
        ValueError: an index out of range.
        FloatingPointError: activations or latents that are NaN or infinite.
    """
    latents = as_indices(latents)
    check_latents(sae, latents)
    columns = torch.as_tensor(latents, device=sae.W_dec.device)
    kind = sae.cfg.architecture()
    if kind not in _COLUMNWISE:
        _check_finite(sae, "its input activations", activations)
        full = sae.encode(activations)
        dense = full.to_dense() if full.is_sparse else full
        _check_finite(sae, "its latents", dense)  # of all: NaN among the k largest would push a chosen one out
        return dense[..., columns]
    x, weights = sae.process_sae_in(activations), sae.W_enc.detach()[:, columns]

    def chosen(parameter: str) -> Float[Tensor, " n_latents"]:
        return getattr(sae, parameter).detach()[columns]  # the biases differ from kind to kind

    if kind == "gated":
        gate, magnitude = x @ weights + chosen("b_gate"), x @ (weights * chosen("r_mag").exp()) + chosen("b_mag")
        _check_finite(sae, "pre-activations", gate, magnitude)
        return (gate > 0).to(sae.dtype) * sae.activation_fn(magnitude)
    pre, limit = x @ weights + chosen("b_enc"), [chosen("threshold")] if kind == "jumprelu" else []
    _check_finite(sae, "pre-activations", pre, *limit)
    acts = sae.activation_fn(pre)
    return acts * (pre > limit[0]).to(acts.dtype) if limit else acts
