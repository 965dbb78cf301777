"""A part of a fine-tune's change at a site, as `mediation` takes it out: of which latents, and at which tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl.data.chat import Batch
from blockem_tl.models.activations import SINK
from blockem_tl.saes.fit import reconstruct
from blockem_tl.saes.latents import encode_latents

Role = Literal["system", "prompt", "reply"]
Kind = Literal["nothing", "latents", "all latents", "SAE error", "residual"]


@dataclass(frozen=True, kw_only=True)
class TakenOut:
    """A part of the change at the site. signs: of the latents, if only changes in their direction count."""

    name: str
    kind: Kind = "latents"
    latents: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()
    roles: tuple[Role, ...] = ("prompt", "reply")

    @property
    def about(self) -> dict[str, Any]:
        """The first columns of its row in a `Mediation`."""
        return {"taken_out": self.name, "n_latents": len(self.latents) or None, "roles": "+".join(self.roles)}


def checked_roles(roles: Sequence[str]) -> tuple[Role, ...]:
    """The roles, or a ValueError that says what there is."""
    if isinstance(roles, str) or not roles or not set(roles) <= set(get_args(Role)):
        raise ValueError(f"mediation: expected roles as lists of {get_args(Role)}, such as [('prompt', 'reply')], got {roles!r}")
    return cast(tuple[Role, ...], tuple(roles))


def read_tokens(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """The tokens over which a site's typical change and norm are taken: those of questions and replies but the first, often a sink."""
    return batch.mask & ~batch.system & (batch.positions > 0)


def sink_norm(norms: Sequence[Tensor]) -> float:
    """The norm above which a token is an attention sink, from those of base's states at `read_tokens`."""
    return SINK * float(torch.cat(list(norms)).median())


def taken_out(
    sae: SAE[Any],
    part: TakenOut,
    base: Float[Tensor, "batch pos d_model"],
    tuned: Float[Tensor, "batch pos d_model"],
    batch: Batch,
    *,
    limit: float,
) -> Float[Tensor, "batch pos d_model"]:
    """``tuned`` without the part of its change; as it is at tokens of other roles, at the first and at sinks (norms above ``limit``)."""
    if part.kind == "nothing":
        return tuned
    where = cast(Bool[Tensor, "batch pos"], sum(batch.roles[role].int() for role in part.roles) > 0)
    where = where & (batch.positions > 0) & (base.float().norm(dim=-1) <= limit)
    out = torch.zeros_like(tuned, dtype=torch.float32)
    if where.any():
        out[where] = change_of(sae, part, base[where].float(), tuned[where].float())
    return tuned - out.to(tuned)


def change_of(
    sae: SAE[Any], part: TakenOut, base: Float[Tensor, "tokens d_model"], tuned: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, "tokens d_model"]:
    """The part of ``tuned - base`` that runs through a set of latents, through all of them, or through the SAE's error."""
    if part.kind == "residual":
        return tuned - base
    if part.kind != "latents":
        carried = reconstruct(sae, tuned) - reconstruct(sae, base)
        return carried if part.kind == "all latents" else tuned - base - carried
    z_base, z_tuned = (encode_latents(sae, states.to(sae.W_dec), part.latents) for states in (base, tuned))
    moved = z_tuned - z_base
    if part.signs:
        moved = torch.where(moved * torch.tensor(part.signs, device=moved.device) > 0, moved, 0)
    full = torch.zeros(len(base), sae.cfg.d_sae, dtype=moved.dtype, device=moved.device)
    full[:, list(part.latents)] = moved
    return (sae.decode(full) - sae.decode(torch.zeros_like(full[:1]))).to(tuned)  # decode is affine: the bias goes
