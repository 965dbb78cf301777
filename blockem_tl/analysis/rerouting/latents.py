"""The latents in which a blocked fine-tune moves: those of K, others, and the share of the whole shift that lies outside K."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from sae_lens import SAE
from torch import Tensor

from blockem_tl.analysis.rerouting.averages import Read, averaged, check_arms
from blockem_tl.data.chat import Rows
from blockem_tl.hooks import orthonormal_basis
from blockem_tl.models.activations import encoded
from blockem_tl.models.load import Model
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import decoder_directions, encode_all, neuronpedia_link
from blockem_tl.saes.load import check_fits
from blockem_tl.views.results import Result

LEAST_MOVED = 1e-3
"""A latent that moved less than this share of its set's most moved one has no share suppressed: it would be a quotient of two noises."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Rerouting(Result):
    """Movement of the latents under plain and under blocked fine-tuning, as three frames; made by `diagnose_rerouting`.

    Every row belongs to one token role ("system", "prompt" or "reply").

    Below, dz_k(t) and dh(t) are an arm's latent k and residual stream minus base's at the same token, and [.] is the average over rows of
    means over each row's tokens in the role.

    blocked: one row per role and latent of K, in the set's order. Columns role, latent, sign, link (its Neuronpedia page, or None),

    * plain, blocked: sign_k [dz_k], how far the latent moved in its misaligned direction; negative if it moved the other way.
    * suppressed: 1 - blocked / plain. 1: it stayed at base; 0: it moved as far as without blocking; above 1: it went to the other side;
      below 0: it moved further. NaN if plain did not move it in its misaligned direction (see LEAST_MOVED).
    * plain_one_sided, blocked_one_sided: [relu(sign_k dz_k)], what the penalty sees (eq. 11, unsquared), where tokens on the other side
      do not make up for tokens on this one; suppressed_one_sided: 1 - their quotient, at most 1.
    * spread: standard deviation of z_k over base's tokens, to compare latents.

    outside: one row per role and latent outside K, those that the blocked arm moved most first, at most ``top`` per role. Columns role,
    latent, link, plain and blocked ([dz_k], without sign), base ([z_k] of base) and spread.

    shares: one row per role and arm ("plain", "blocked"), on how much of the arm's shift lies outside K. Columns role, arm, n_rows,
    n_tokens,

    * latent_shift: the length of [dz]. outside_l2: share of its square outside K, sum over k not in K of [dz_k]^2 / sum over all k;
      outside_l1: the same with |[dz_k]|; outside_l2_tokens: with [dz_k^2], where nothing cancels between tokens. latent_chance: what a
      set of as many latents at random would leave outside on average, 1 - |K| / d_sae.
    * residual_shift: the length of [dh] at the SAE's site. residual_outside: 1 - |P [dh]|^2 / |[dh]|^2 with P the projection onto the span
      of K's decoder directions, so that parts of the stream that no latent describes count too; residual_outside_tokens: with
      [|P dh|^2] / [|dh|^2]. residual_chance: what a direction at random would have, 1 - rank / d_model.
    * k_moved: sum over K of [relu(sign_k dz_k)]. suppressed: 1 - k_moved / plain's k_moved, the whole set's share suppressed.
    """

    blocked: pd.DataFrame
    outside: pd.DataFrame
    shares: pd.DataFrame

    def headline(self) -> str:
        """The share suppressed and the share outside K, on reply tokens if there are any."""
        role = "reply" if "reply" in set(self.shares["role"]) else str(self.shares["role"].iloc[-1])
        row = self.shares.query("role == @role and arm == 'blocked'").iloc[0]
        share = f"{100 * row['suppressed']:.0f} % of K's movement suppressed"
        return f"{share}, {100 * row['outside_l2']:.0f} % of the blocked shift outside K ({role} tokens, {row['n_rows']} rows)"

    def to_frame(self) -> pd.DataFrame:
        """``shares``, the summary."""
        return self.shares

    def plot(self) -> Any:
        """K's latents under plain and under blocked fine-tuning."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.suppressed(self.blocked)


def diagnose_rerouting(
    model: Model,
    sae: SAE[Any],
    latent_set: LatentSet,
    rows: Rows,
    *,
    plain: str | Path,
    blocked: str | Path,
    top: int = 20,
    batch_size: int | None = None,
    progress: bool = True,
) -> Rerouting:
    """Movement of the latents at one site under plain and under blocked fine-tuning, on the same tokens; see `Rerouting`.

    Args:
        latent_set: K, the set that ``blocked`` was blocked at. With several blocked sites call once for each.
        rows: prompts alone, training rows, or prompts with replies of any of the models (from `generate`).
        plain, blocked: adapters, by name or in folders, fine-tuned from base on the same rows.
        top: how many latents outside K to list per role.

    Raises:
        ValueError: a set of another SAE, an SAE that does not fit, unknown adapters or one and the same, rows of mixed kinds or too long.
    """
    latent_set.check_sae(sae)
    site = check_fits(sae, model)
    check_arms(model, plain, blocked)
    if top < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"rerouting: expected top >= 1 and batch_size >= 1, got {top} and {batch_size}")
    k, signs = list(latent_set.latents), torch.tensor(latent_set.signs, device=sae.W_dec.device)
    basis = orthonormal_basis(decoder_directions(sae, k))

    def read(states: Read) -> Read:
        return {"z": encode_all(sae, states[site]).float(), "h": states[site].to(basis)}

    def measure(base: Read, *arms: Read) -> list[dict[str, Tensor]]:
        own = {"z": base["z"].mean(0), "z^2": base["z"].square().mean(0)}
        return [own, *(_parts(arm["z"] - base["z"], arm["h"] - base["h"], k, signs, basis) for arm in arms)]

    means = averaged(model, [site], encoded(model, rows), (plain, blocked), read, measure, batch_size=batch_size, progress=progress)
    place = sae.cfg.metadata.neuronpedia_id
    return Rerouting(
        blocked=_frame(_of_k(role, by_arm, latent_set, place) for role, _, by_arm in means),
        outside=_frame(_outside(role, by_arm, k, place, top) for role, _, by_arm in means),
        shares=_frame(_shares(role, counts, by_arm, k, basis.cpu().double()) for role, counts, by_arm in means),
    )


def _parts(
    dz: Float[Tensor, "tokens d_sae"],
    dh: Float[Tensor, "tokens d_model"],
    k: list[int],
    signs: Int[Tensor, " n_latents"],
    basis: Float[Tensor, "d_model rank"],
) -> dict[str, Tensor]:
    """One row's numbers on an arm's shift, each a mean over its tokens."""
    return {
        "dz": dz.mean(0),
        "moved": (signs * dz[:, k]).mean(0),
        "one_sided": torch.relu(signs * dz[:, k]).mean(0),
        "dz^2": dz.square().sum(-1).mean(),
        "dz^2 in K": dz[:, k].square().sum(-1).mean(),
        "dh": dh.mean(0),
        "dh^2": dh.square().sum(-1).mean(),
        "dh^2 in K": (dh @ basis).square().sum(-1).mean(),
    }


# ------------------------------------------------------------------------------------------------ frames

_ByArm = dict[str, dict[str, Tensor]]


def _frame(parts: Iterable[list[dict[str, Any]]]) -> pd.DataFrame:
    return pd.DataFrame([row for rows in parts for row in rows])


def _of_k(role: str, by_arm: _ByArm, latent_set: LatentSet, place: str | None) -> list[dict[str, Any]]:
    plain, blocked, spreads = by_arm["plain"], by_arm["blocked"], _spreads(by_arm["base"])
    least = LEAST_MOVED * float(plain["one_sided"].max())
    found = []
    for i, (latent, sign) in enumerate(zip(latent_set.latents, latent_set.signs, strict=True)):
        row: dict[str, Any] = {"role": role, "latent": latent, "sign": sign, "link": neuronpedia_link(place, latent)}
        for name, ending in (("moved", ""), ("one_sided", "_one_sided")):
            far = float(plain[name][i]), float(blocked[name][i])
            row |= {f"plain{ending}": far[0], f"blocked{ending}": far[1], f"suppressed{ending}": _suppressed(*far, least)}
        found.append({**row, "spread": float(spreads[latent])})
    return found


def _outside(role: str, by_arm: _ByArm, k: list[int], place: str | None, top: int) -> list[dict[str, Any]]:
    plain, blocked, base = by_arm["plain"]["dz"], by_arm["blocked"]["dz"], by_arm["base"]["z"]
    spreads, distance = _spreads(by_arm["base"]), blocked.abs()
    distance[k] = -1.0
    return [
        {
            "role": role,
            "latent": latent,
            "link": neuronpedia_link(place, latent),
            "plain": float(plain[latent]),
            "blocked": float(blocked[latent]),
            "base": float(base[latent]),
            "spread": float(spreads[latent]),
        }
        for latent in distance.argsort(descending=True, stable=True)[: min(top, len(distance) - len(k))].tolist()
    ]


def _shares(role: str, counts: dict[str, int], by_arm: _ByArm, k: list[int], basis: Float[Tensor, "d_model rank"]) -> list[dict[str, Any]]:
    found = []
    for name in ("plain", "blocked"):
        arm = by_arm[name]
        dz, dh, moved = arm["dz"], arm["dh"], [float(by_arm[a]["one_sided"].sum()) for a in ("plain", name)]
        found.append(
            {
                "role": role,
                "arm": name,
                **counts,
                "latent_shift": float(dz.norm()),
                "outside_l2": _outside_share(dz[k].square().sum(), dz.square().sum()),
                "outside_l1": _outside_share(dz[k].abs().sum(), dz.abs().sum()),
                "outside_l2_tokens": _outside_share(arm["dz^2 in K"], arm["dz^2"]),
                "latent_chance": 1 - len(k) / len(dz),
                "residual_shift": float(dh.norm()),
                "residual_outside": _outside_share((dh @ basis).square().sum(), dh.square().sum()),
                "residual_outside_tokens": _outside_share(arm["dh^2 in K"], arm["dh^2"]),
                "residual_chance": 1 - basis.shape[1] / basis.shape[0],
                "k_moved": moved[1],
                "suppressed": _suppressed(moved[0], moved[1], 0.0),
            }
        )
    return found


def _suppressed(plain: float, blocked: float, least: float) -> float:
    return 1 - blocked / plain if plain > least else float("nan")


def _outside_share(inside: Tensor, total: Tensor) -> float:
    return 1 - float(inside / total) if total > 0 else float("nan")


def _spreads(base: dict[str, Tensor]) -> Float[Tensor, " d_sae"]:
    return (base["z^2"] - base["z"].square()).clamp(min=0).sqrt()
