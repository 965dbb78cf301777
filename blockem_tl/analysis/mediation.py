"""`mediation`: how much of a fine-tune's effect runs through an SAE's latents at a site: a guide before training to what blocking reaches.

The tuned model runs with part of its change at the site taken out again, token by token::

    h <- h_tuned - sum_k (z_tuned - z_base)_k d_k        a set of latents; one-sided: only changes in the direction of each latent's sign
    h <- h_tuned - (h_tuned - h_base)                    the whole residual

and the share of the behavioural gap that goes is 1 - (margin - margin_base) / (margin_tuned - margin_base), the margin being that of
`preference` on contrastive pairs. The share of the task's gain that goes with it is measured by the loss on held-out rows. What the latents
of a set do not carry runs through other latents, through the SAE's error, or past the tokens chosen. Attention sinks are left as they are:
there an SAE is off its distribution.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from sae_lens import SAE
from torch import Tensor

from blockem_tl.analysis._from_site import reply_nats
from blockem_tl.analysis._taken_out import Role, TakenOut, checked_roles, read_tokens, sink_norm, taken_out
from blockem_tl.data.chat import Batch, Encoded, check_lengths, encode_examples, pad
from blockem_tl.data.pair_files import check_pairs
from blockem_tl.evaluation.preference import sides
from blockem_tl.evaluation.statistics import share_removed
from blockem_tl.models.activations import base_activations, stop_layer
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.models.memory import check_batch_size, rows_at_once
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import check_latents, encode_all
from blockem_tl.saes.load import check_fits
from blockem_tl.types import Example, Pair
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.results import Result

MOST_ROWS = 32


@dataclass(frozen=True, kw_only=True, repr=False)
class Mediation(Result):
    """What goes when parts of the change are taken out.

    rows: taken_out, n_latents, roles, removed (share of the gap between tuned and base in the pairs' mean margin that goes, with a 95 %
    bootstrap interval over pairs), task_lost (share of the gain in loss on held-out rows that goes), margin and loss, in nats.
    """

    site: str
    margin_base: float
    margin_tuned: float
    loss_base: float
    loss_tuned: float
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)

    def headline(self) -> str:
        """The gap, and the part that carries most of it."""
        best = max(self.rows, key=lambda row: row["removed"])
        return (
            f"at {self.site}: margin {self.margin_base:+.3f} -> {self.margin_tuned:+.3f} nats per token, loss {self.loss_base:.3f} -> "
            f"{self.loss_tuned:.3f}; {best['taken_out']} carries {100 * best['removed']:.0f} % of the gap"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per part."""
        return pd.DataFrame(list(self.rows))

    def plot(self) -> Any:
        """A bar for each part: the share of the gap that goes."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        frame = self.to_frame()
        label = frame["taken_out"] + " (" + frame["roles"] + ")"
        return plots.bars(frame.assign(part=label), x="part", y="removed", title="share of the gap that goes")


def mediation(
    model: Model,
    sae: SAE[Any],
    pairs: Sequence[Pair],
    rows: Sequence[Example],
    sets: Mapping[str, LatentSet | Sequence[int]],
    *,
    adapter: str | Path,
    sizes: Sequence[int] = (),
    one_sided: bool = False,
    roles: Sequence[Sequence[Role]] = (("prompt", "reply"),),
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Mediation:
    """Shares of the fine-tune's effect that run through latents at the SAE's site.

    Args:
        pairs: for the behaviour.  rows: held-out rows of the narrow task, for its gain.
        sets: latents by name, best first.
        adapter: the tuned weights; the other side is base.
        sizes: also the first so many latents of each set: the curve over |K|.
        one_sided: count only changes in the direction of a latent's sign, as blocking does; for latents without signs, and for the random
            ones, the direction in which each moved on average over the pairs.
        roles: tokens that are acted on, one combination after the other: blocking on completions acts on ("reply",).
        seed: of the random sets, one of every size.

    Raises:
        ValueError: pairs or rows that cannot be read, latents that are none, no gap between base and tuned, an SAE of another model.
    """
    site = check_fits(sae, model)
    encoded, size = encoded_rows(model, pairs, rows, batch_size)
    with model.holding(adapter) as held:  # a folder is loaded once
        run = _Run(model, sae, site, str(held), encoded, size)
        change, run.limit = run.mean_change(encoded[: 2 * len(pairs)])
        parts = [TakenOut(name="nothing", kind="nothing"), *_parts(sae, sets, change, sizes, one_sided, roles, seed)]
        nats = run.log_likelihoods(parts, progress)
    return shares(site, [part.about for part in parts[1:]], nats, len(pairs))


def encoded_rows(model: Model, pairs: Sequence[Pair], rows: Sequence[Example], batch_size: int | None) -> tuple[list[Encoded], int]:
    """The pairs' harmful sides, their helpful ones, and the rows; and how many are read at once. Raises ValueError as `mediation`."""
    check_pairs(pairs)
    check_batch_size(batch_size)
    encoded = encode_examples(model.tokenizer, [*sides(pairs), *rows])
    check_lengths(encoded, model.cfg.n_ctx)
    return encoded, batch_size or rows_at_once(model, max(len(row.ids) for row in encoded), most=MOST_ROWS)


def batches(model: Model, rows: Sequence[Encoded], size: int) -> Iterator[Batch]:
    """So many rows at a time, in their order."""
    for start in range(0, len(rows), size):
        yield pad(rows[start : start + size], model.pad_id, side="right", device=model.device)


def _parts(
    sae: SAE[Any],
    sets: Mapping[str, LatentSet | Sequence[int]],
    change: Float[Tensor, " d_sae"],
    sizes: Sequence[int],
    one_sided: bool,
    roles: Sequence[Sequence[Role]],
    seed: int,
) -> Iterator[TakenOut]:
    """For each choice of roles: every set at every size, a random set of each size, all latents, the SAE's error, the whole residual."""
    moved = torch.where(change >= 0, 1, -1).tolist()
    alive, draw = change.nonzero()[:, 0].tolist(), np.random.default_rng(seed)
    for acting in (checked_roles(one) for one in roles):
        counts = set[int]()
        for name, given in sets.items():
            latents = tuple(given.latents) if isinstance(given, LatentSet) else tuple(given)
            check_latents(sae, latents)
            signs = given.signs if isinstance(given, LatentSet) else tuple(moved[k] for k in latents)
            for n in sorted({*(n for n in sizes if n < len(latents)), len(latents)}):
                counts.add(n)
                chosen = {"latents": latents[:n], "signs": signs[:n] if one_sided else ()}
                yield TakenOut(name=name if n == len(latents) else f"{name}, first {n}", roles=acting, **chosen)
        for n in sorted(n for n in counts if n <= len(alive)):
            latents = tuple(int(k) for k in draw.choice(alive, n, replace=False))
            signs = tuple(moved[k] for k in latents) if one_sided else ()
            yield TakenOut(name=f"{n} random", latents=latents, signs=signs, roles=acting)
        for kind in ("all latents", "SAE error", "residual"):
            yield TakenOut(name=kind, kind=kind, roles=acting)


class _Run:
    """Rows, teacher-forced through base and tuned."""

    def __init__(self, model: Model, sae: SAE[Any], site: str, adapter: str, encoded: Sequence[Encoded], size: int) -> None:
        self.model, self.sae, self.site, self.adapter, self.encoded, self.size = model, sae, site, adapter, encoded, size
        self.limit = float("inf")

    def _states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Base's and tuned's states at the site, each [batch pos d_model]."""
        with self.model.recording([self.site]) as store, self.model.using(self.adapter):
            self.model(batch.ids, attention_mask=batch.mask.long(), stop_at_layer=stop_layer(self.model, [self.site]))
        return base_activations(self.model, batch, [self.site])[self.site], store[self.site]

    @torch.no_grad()
    def mean_change(self, rows: Sequence[Encoded]) -> tuple[Float[Tensor, " d_sae"], float]:
        """The mean change of every latent over the tokens of prompts and replies, and the norm above which a token is a sink."""
        total, n, norms = torch.zeros(self.sae.cfg.d_sae), 0, []
        for batch in batches(self.model, rows, self.size):
            base, tuned = self._states(batch)
            where = read_tokens(batch)
            z_base, z_tuned = (encode_all(self.sae, states[where]) for states in (base, tuned))
            total += (z_tuned - z_base).sum(0).float().cpu()
            n += int(where.sum())
            norms.append(base[where].float().norm(dim=-1))
        return total / n, sink_norm(norms)

    @torch.no_grad()
    def log_likelihoods(self, parts: Sequence[TakenOut], progress: bool) -> Float[np.ndarray, "parts n_rows"]:
        """Mean log-likelihood of each row's reply with each part taken out; the last row is base's."""
        found = np.zeros((len(parts) + 1, len(self.encoded)))
        with progress_bar(total=len(self.encoded) * len(found), desc="mediation", show=progress) as bar:
            for b, batch in enumerate(batches(self.model, self.encoded, self.size)):
                here = slice(b * self.size, b * self.size + len(batch.ids))
                base, tuned = self._states(batch)
                for p, part in enumerate(parts):
                    left = taken_out(self.sae, part, base, tuned, batch, limit=self.limit)
                    found[p, here] = self._forward(batch, self.adapter, left)
                    bar.update(len(batch.ids))
                found[-1, here] = self._forward(batch, BASE, base)
                bar.update(len(batch.ids))
        return found

    def _forward(self, batch: Batch, adapter: str, state: Float[Tensor, "batch pos d_model"]) -> Float[np.ndarray, " batch"]:
        with self.model.using(adapter):
            return reply_nats(self.model, batch, self.site, state)


def shares(site: str, about: Sequence[Mapping[str, Any]], nats: Float[np.ndarray, "parts n_rows"], n_pairs: int) -> Mediation:
    """Shares of the gaps that go with each part, from the log-likelihoods of `encoded_rows`.

    about: of each part, the first columns of its row.  nats: those of the tuned model, with each part taken out, and base's.
    """
    margins, losses = nats[:, :n_pairs] - nats[:, n_pairs : 2 * n_pairs], -nats[:, 2 * n_pairs :].mean(1)
    base, tuned = margins[-1], margins[0]
    gain = losses[-1] - losses[0]
    if (tuned - base).mean() <= 0:
        raise ValueError(f"mediation: expected a tuned model that moved towards harm, its margin moved by {(tuned - base).mean():+.4f}")
    found = []
    for part, margin, loss in zip(about, margins[1:-1], losses[1:-1], strict=True):
        gone = share_removed(base, tuned, margin)
        share = {"removed": gone.value, "removed_low": gone.low, "removed_high": gone.high}
        lost = float((loss - losses[0]) / gain) if gain > 0 else float("nan")
        found.append({**part, **share, "task_lost": lost, "margin": float(margin.mean()), "loss": float(loss)})
    ends = {"margin_base": base.mean(), "margin_tuned": tuned.mean(), "loss_base": losses[-1], "loss_tuned": losses[0]}
    return Mediation(site=site, rows=tuple(found), **{name: float(value) for name, value in ends.items()})
