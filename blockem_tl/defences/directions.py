"""The direction in which a latent set is misaligned, for defences that steer; and steering that leaves base alone."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from blockem_tl.generation.steering import Condition, Steering
from blockem_tl.hooks import Hook, resolve
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import decoder_directions

Combine = Literal["best", "sum"]


def misaligned_direction(latent_set: LatentSet, sae: SAE[Any], *, combine: Combine = "best") -> Float[Tensor, " d_model"]:
    """A unit direction that points to misalignment.

    combine: "best" is sign * d-hat of the set's first latent (sets are ordered best first). "sum" is the sum of sign_k * d-hat_k over
    all of them, normalised, so that a dose means the same strength for both.

    Raises:
        ValueError: another SAE than the set's, or a sum that cancels out.
    """
    latent_set.check_sae(sae)
    directions = decoder_directions(sae, latent_set.latents)
    signed = directions * torch.tensor(latent_set.signs, dtype=directions.dtype, device=directions.device)[:, None]
    total = signed[0] if combine == "best" else signed.sum(0)
    if total.norm() < 1e-6:
        raise ValueError("the latents' signed directions cancel out: there is no common direction to steer along; use combine='best'")
    return total / total.norm()


def repair(latent_set: LatentSet, sae: SAE[Any], *, dose: float, scale: float, combine: Combine = "best") -> Condition:
    """A condition that steers the tuned model away from misalignment while it replies: ``evaluate(..., condition=repair(...))``.

    h <- h - dose * scale * (misaligned direction) at the set's site, the repair arm of eq. 6.

    Args:
        dose: dimensionless, > 0 (the sign is this function's).  scale: the site's median norm on base.

    Raises:
        ValueError: a dose that is not a positive number, or another SAE than the set's.
    """
    return _along("repair", -1, latent_set, sae, dose, scale, combine)


def induce(latent_set: LatentSet, sae: SAE[Any], *, dose: float, scale: float, combine: Combine = "best") -> Condition:
    """A condition that steers towards misalignment, the induce arm of eq. 6: h <- h + dose * scale * (misaligned direction).

    Arguments and errors as of `repair`.
    """
    return _along("induce", +1, latent_set, sae, dose, scale, combine)


def _along(name: str, sign: int, latent_set: LatentSet, sae: SAE[Any], dose: float, scale: float, combine: Combine) -> Condition:
    if not 0 < dose < float("inf"):
        raise ValueError(f"{name}: expected a finite dose > 0 (the sign is this function's), got {dose}")
    direction = misaligned_direction(latent_set, sae, combine=combine)
    steering = Steering(site=latent_set.site, direction=direction, dose=sign * dose, scale=scale)
    return Condition(name=f"{name}, {combine}, dose {dose:g}", steering=(steering,))


def check_direction(who: str, directions: object, model: Model | None = None, site: str = "") -> None:
    """Raise ValueError unless these are finite, non-zero directions and, with ``model``, its ``site`` exists and has their width."""
    if not isinstance(directions, Tensor) or directions.ndim not in (1, 2) or not directions.numel():
        got = tuple(directions.shape) if isinstance(directions, Tensor) else directions
        raise ValueError(
            f"{who}: expected a direction tensor [d_model] or [n_directions, d_model], got {got}: take one from a latent set "
            "(misaligned_direction), or the difference of two means"
        )
    if not torch.isfinite(directions).all() or (torch.atleast_2d(directions).norm(dim=-1) == 0).any():
        raise ValueError(f"{who}: expected finite, non-zero directions, got zero, NaN or infinite ones")
    if model is not None:
        resolve(model.hook_dict, site)
        if directions.shape[-1] != model.cfg.d_model:
            raise ValueError(f"{who} at {site}: expected directions of width {model.cfg.d_model}, got {directions.shape[-1]}")


def on_tuned_only(model: Model, hook: Hook) -> Hook:
    """The hook, silent while the model is base: a defence that runs base inside another's forward sees base as it is."""
    site, act = hook

    def fn(activation: Tensor, hook: HookPoint) -> Tensor | None:
        return act(activation, hook=hook) if model.active_adapter is not None else None

    return site, fn
