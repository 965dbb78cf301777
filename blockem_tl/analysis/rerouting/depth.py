"""The depth at which plain fine-tuning's shift comes back in a blocked model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from blockem_tl.analysis.rerouting.averages import ARMS, Read, averaged, check_arms
from blockem_tl.data.chat import Rows
from blockem_tl.hooks import resolve
from blockem_tl.models.activations import block_of, encoded
from blockem_tl.models.load import Model
from blockem_tl.types import EXAMPLE_SITE, check_names
from blockem_tl.views.results import Result

_NAN, _INFINITY = float("nan"), float("inf")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ShiftBySite(Result):
    """The mean shifts [dh] of plain and of blocked fine-tuning at each site; made by `shift_by_site`.

    dh(t) is an arm's activation minus base's at the same token, and [.] the average over rows of means over each row's tokens in one role.
    frame: one row per role and site, with columns role, site, block, n_rows, n_tokens, and

    * base: [|h|] of base, to set lengths against. plain, blocked: the lengths of the arms' [dh].
    * ratio: blocked / plain; cosine: between the two shifts.
    * returned: ratio * cosine, the share of plain's shift that is also in the blocked model: <[dh_blocked], [dh_plain]> / |[dh_plain]|^2.
      It is 1 for blocked = plain, and 0 for no shift or one at right angles. NaN, as cosine, if there is no shift to compare with.
    """

    frame: pd.DataFrame

    def headline(self) -> str:
        """The site at which most of plain's shift is in the blocked model."""
        top = self.frame.loc[self.frame["returned"].fillna(-_INFINITY).idxmax()]
        return (
            f"{self.frame['site'].nunique()} sites; most of plain's shift returned: {top['returned']:.2f} at {top['site']} ({top['role']})"
        )

    def to_frame(self) -> pd.DataFrame:
        """``frame``."""
        return self.frame

    def plot(self) -> Any:
        """Ratio, cosine and returned share along the depth."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.rerouting(self.frame)


def shift_by_site(
    model: Model,
    rows: Rows,
    *,
    plain: str | Path,
    blocked: str | Path,
    sites: Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> ShiftBySite:
    """The mean shift under plain and under blocked fine-tuning, site by site: it shows at which depth plain's comes back.

    Args:
        rows: prompts alone, training rows, or prompts with replies of any of the models (from `generate`).
        plain, blocked: adapters, by name or in folders, fine-tuned from base on the same rows.
        sites: [batch pos d_model] hook names; None is ``hook_resid_post`` of every block. One forward per batch and arm serves them all.

    Raises:
        ValueError: an unknown site, unknown adapters or one and the same, rows of mixed kinds or too long.
    """
    every = [f"blocks.{block}.hook_resid_post" for block in range(model.cfg.n_layers)]
    chosen = every if sites is None else check_names("shift_by_site", sites, such_as=EXAMPLE_SITE)
    if not chosen or (batch_size is not None and batch_size < 1):
        raise ValueError(f"rerouting: expected at least one site and batch_size >= 1, got {chosen} and {batch_size}")
    for site in chosen:
        resolve(model.hook_dict, site)
    check_arms(model, plain, blocked)

    def read(states: Read) -> Read:
        return {site: h.float() for site, h in states.items()}

    def measure(base: Read, *arms: Read) -> list[dict[str, Tensor]]:
        lengths = {site: h.norm(dim=-1).mean() for site, h in base.items()}
        return [lengths, *({site: (h - base[site]).mean(0) for site, h in arm.items()} for arm in arms)]

    means = averaged(model, chosen, encoded(model, rows), (plain, blocked), read, measure, batch_size=batch_size, progress=progress)
    return ShiftBySite(
        frame=pd.DataFrame(
            {"role": role, "site": site, "block": block_of(site), **counts, **_compared(*(by_arm[arm][site] for arm in ARMS))}
            for role, counts, by_arm in means
            for site in chosen
        )
    )


def returning_sites(shifts: ShiftBySite | pd.DataFrame, blocked_site: str, *, role: str = "reply", margin: float = 0.1) -> list[str]:
    """The sites, from the first block to the last, at which plain's shift is there again: candidates for blocking as well.

    These are the sites at which the share of plain's shift that is in the blocked model (``returned``) is greater than at the blocked site
    by more than ``margin``. Above the site it came back, below the site it was never kept away.

    Args:
        shifts: of `shift_by_site`, or several seeds' or runs' frames one below the other, whose mean decides.
        blocked_site: where K is blocked, as spelled in the frame.

    Raises:
        ValueError: a role or site that the frame does not have, a site without a share (plain did not move there), a negative margin.
    """
    frame = shifts.frame if isinstance(shifts, ShiftBySite) else shifts
    of_role = pd.DataFrame(frame[frame["role"] == role])
    if blocked_site not in set(of_role["site"]) or margin < 0:
        known = {name: sorted(frame[name].unique()) for name in ("role", "site")}
        raise ValueError(f"rerouting: expected one of {known} and a margin >= 0, got {role!r}, {blocked_site!r} and {margin}")
    if of_role["returned"].isna().any():
        missing = sorted(of_role.loc[of_role["returned"].isna(), "site"].unique())
        raise ValueError(f"rerouting: plain did not move at {missing} on {role} tokens, so there is nothing that could return")
    share = {str(site): float(rows["returned"].mean()) for site, rows in of_role.groupby("site")}
    block = {str(site): float(rows["block"].fillna(-1).iloc[0]) for site, rows in of_role.groupby("site")}  # the embedding has none
    found = [site for site, value in share.items() if site != blocked_site and value > share[blocked_site] + margin]
    return sorted(found, key=block.__getitem__)


def _compared(base: Float[Tensor, ""], plain: Float[Tensor, " d_model"], blocked: Float[Tensor, " d_model"]) -> dict[str, float]:
    size, other, along = float(plain.norm()), float(blocked.norm()), float(plain @ blocked)
    return {
        "base": float(base),
        "plain": size,
        "blocked": other,
        "ratio": other / size if size > 0 else _NAN,
        "cosine": along / (size * other) if size > 0 and other > 0 else _NAN,
        "returned": along / size**2 if size > 0 else _NAN,
    }
