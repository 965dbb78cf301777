"""H1: the SAE's reconstruction of the residual stream over fine-tuning (paper, section 5 and Figure 28)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor
from torch.nn.functional import cosine_similarity

from blockem_tl.data.chat import Encoded, Rows
from blockem_tl.models.activations import encoded, read_site
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.fit import reconstruct
from blockem_tl.saes.load import check_fits
from blockem_tl.training.checkpoints import trajectory
from blockem_tl.types import check_names
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.results import Result

MOST_ROWS = 16
"""Rows per forward, if nobody says how many."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Reconstruction(Result):
    """An SAE's reconstruction, arm by arm; made by `reconstruction_quality`.

    frame: one row per arm and token role ("system", "prompt", "reply", see `Batch.roles`; roles without tokens are left out), with
    columns arm, epoch (0 for base, NaN for other named arms), role, n_tokens and, over all tokens of the role together:

    * mse: mean of (h - h_sae)^2 over tokens and over the d_model elements, in the model's own units squared; times d_model it is the
      mean squared distance.
    * variance: of the same activations, per element: mean of (h - mean h)^2. normalised_mse: mse / variance.
    * explained_variance: 1 - normalised_mse; negative if the mean would have been the better reconstruction.
    * cosine: mean over tokens of cos(h, h_sae).

    Beginning-of-sequence tokens, whose norm is often a hundred times that of others, are in the role "system". If those tokens are the
    same in every row they hardly vary, so that their normalised numbers mean little; mse and cosine do.
    """

    frame: pd.DataFrame

    def headline(self) -> str:
        """Explained variance of the first and the last arm, on the last role."""
        role = str(self.frame["role"].iloc[-1])
        rows = pd.DataFrame(self.frame[self.frame["role"] == role])
        first, last = rows.iloc[0], rows.iloc[-1]
        shares = f"{first['explained_variance']:.3f} in {first['arm']}, {last['explained_variance']:.3f} in {last['arm']}"
        return f"{rows['arm'].nunique()} arms; explained variance on {role} tokens: {shares}"

    def to_frame(self) -> pd.DataFrame:
        """``frame``."""
        return self.frame

    def plot(self) -> Any:
        """Normalised error and cosine over training."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.reconstruction(self.frame)


def reconstruction_quality(
    model: Model,
    sae: SAE[Any],
    rows: Rows,
    *,
    adapters: Sequence[str | Path] = (BASE,),
    checkpoints: str | Path | Sequence[str | Path] = (),
    batch_size: int | None = None,
    progress: bool = True,
) -> Reconstruction:
    """The SAE's reconstruction of the activations at its site, arm by arm on the same tokens; see `Reconstruction`.

    Args:
        rows: prompts alone, training rows, or prompts with replies (from `generate`); every arm reads the same.
        adapters: "base", names of adapters that the model holds, or their folders; their ``arm`` is that name.
        checkpoints: of one run of ``finetune(checkpoints=...)``: its folder, or some of its checkpoints. Each is loaded for its turn; its
            ``arm`` is its folder's name.

    Raises:
        ValueError: an SAE that does not fit, or whose input scaling was never folded in; rows of mixed kinds; an unknown adapter; a folder
            that is no checkpoint, or checkpoints of different runs (naming what differs). All before any work.
    """
    site = check_fits(sae, model)
    for adapter in check_names("reconstruction_quality(adapters=)", adapters, such_as="plain"):
        model.check_adapter(adapter)
    saved = trajectory(checkpoints) if isinstance(checkpoints, (str, Path)) or checkpoints else []
    tokens = encoded(model, rows)
    arms: list[tuple[str, float, str | Path]] = [
        (Path(adapter).name, 0.0 if adapter == BASE else float("nan"), adapter) for adapter in adapters
    ]
    arms += [(folder.name, epoch, folder) for epoch, folder in saved]
    if not arms or (batch_size is not None and batch_size < 1):
        raise ValueError(f"reconstruction: expected adapters or checkpoints, and batch_size >= 1, got none or {batch_size}")
    found = []
    for name, epoch, adapter in progress_bar(arms, desc="reconstruction", show=progress):
        with model.using(adapter):
            found += [{"arm": name, "epoch": epoch, **row} for row in _measured(model, sae, site, tokens, batch_size or MOST_ROWS)]
    return Reconstruction(frame=pd.DataFrame(found))


def _measured(model: Model, sae: SAE[Any], site: str, rows: Sequence[Encoded], batch_size: int) -> Iterator[dict[str, Any]]:
    sums: dict[str, _Sums] = {}
    for activations, batch in read_site(model, site, rows, batch_size=batch_size):
        for i, real in enumerate(batch.mask):  # row by row: the latents of a whole batch may not fit
            h = activations[i][real].float()
            given_back = reconstruct(sae, h)
            for role, where in batch.roles.items():
                if (here := where[i][real]).any():
                    sums.setdefault(role, _Sums()).add(h[here], given_back[here])
    for role in sorted(sums, key=("system", "prompt", "reply").index):
        yield {"role": role, **sums[role].row()}


class _Sums:
    """Sums over tokens, in double precision: a variance is a small difference of large numbers."""

    def __init__(self) -> None:
        self.n = 0
        self.lost = self.squares = self.cosines = 0.0
        self.total: Tensor | None = None

    def add(self, h: Float[Tensor, "tokens d_model"], given_back: Float[Tensor, "tokens d_model"]) -> None:
        h, given_back = h.double(), given_back.double()
        self.n += len(h)
        self.lost += float((h - given_back).square().sum())
        self.squares += float(h.square().sum())
        self.cosines += float(cosine_similarity(h, given_back, dim=-1).sum())
        self.total = h.sum(0) if self.total is None else self.total + h.sum(0)

    def row(self) -> dict[str, Any]:
        assert self.total is not None
        elements = self.n * len(self.total)
        mse = self.lost / elements
        variance = (self.squares - float(self.total.square().sum()) / self.n) / elements
        normalised = mse / variance if variance > 0 else float("nan")  # one token has no variance
        return {
            "n_tokens": self.n,
            "mse": mse,
            "variance": variance,
            "normalised_mse": normalised,
            "explained_variance": 1 - normalised,
            "cosine": self.cosines / self.n,
        }
