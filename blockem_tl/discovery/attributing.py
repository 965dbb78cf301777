"""Gradient attribution on contrastive pairs: which latents' changes moved the margin. A candidate rule beside the shift (eq. 5).

The tuned model's margin M (log p(harmful) - log p(helpful), nats per token, see `preference`) is differentiated once per answer::

    attribution_k = mean over pairs of sum_t (z_tuned - z_base)_tk (dM/dh_t . d_k)        only changes in the direction of the shift's sign

To first order this is what M falls by if latent k's change is taken out, as blocking does; `mediation` measures it. The same on rows of the
narrow task, with their log-likelihood in M's place, says what the task would lose. Attention sinks and template tokens are left out. Nanda
2023 (attribution patching), Marks et al. 2024 (of SAE latents).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from blockem_tl.data.chat import Batch, check_lengths, encode_examples, pad
from blockem_tl.data.pair_files import check_pairs
from blockem_tl.evaluation.preference import reply_likelihood, sides
from blockem_tl.models.activations import SINK, base_activations, check_finite
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.saes.latents import encode_all
from blockem_tl.saes.load import check_fits
from blockem_tl.types import Candidate, Example, Pair, Prompt
from blockem_tl.views.progress import progress_bar

MOST_ROWS = 8
"""Answers per backward, if nobody says how many."""


@dataclass(frozen=True, kw_only=True)
class PairDiff:
    """Of every latent, [d_sae]: the mean shift over tokens (tuned minus base), and its attribution in nats per token."""

    shift: Float[Tensor, " d_sae"]
    attribution: Float[Tensor, " d_sae"]

    def __post_init__(self) -> None:
        if not torch.isfinite(self.shift).all() or not torch.isfinite(self.attribution).all():
            raise FloatingPointError("attribution: shifts or gradients of latents are NaN or infinite: a broken adapter, or SAE?")


def pair_diff(
    model: Model,
    sae: SAE[Any],
    pairs: Sequence[Pair],
    *,
    adapter: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> PairDiff:
    """Shifts and attributions of all latents on both answers of the pairs, prompt and answer tokens.

    Args:
        adapter: the tuned weights; None: the model as it stands. The other side is base.
        batch_size: answers per backward; None: 8.

    Raises:
        ValueError: pairs that cannot be read, an SAE of another model, or weights that move no latent.
    """
    check_pairs(pairs)
    weights = [sign / len(pairs) for sign in (1, -1) for _ in pairs]
    found = _sums(model, sae, sides(pairs), weights, adapter, batch_size, progress)
    if not found.total.any():
        raise ValueError("attribution: tuned and base have the same latents on these pairs: is the adapter the tuned model's?")
    return PairDiff(shift=found.total / found.n_tokens, attribution=torch.where(found.total >= 0, found.up, found.down))


def task_attribution(
    model: Model,
    sae: SAE[Any],
    rows: Sequence[Example],
    shift: Float[Tensor, " d_sae"],
    *,
    adapter: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Float[Tensor, " d_sae"]:
    """What the rows' log-likelihood, in nats per token, loses to first order if a latent's changes in the direction of ``shift`` go.

    Args:
        rows: of the narrow task, held out from training.  adapter, batch_size: as in `pair_diff`.

    Raises:
        ValueError: no rows, or an SAE of another model.
    """
    if not rows:
        raise ValueError("attribution: expected rows of the narrow task, got none")
    found = _sums(model, sae, rows, [1 / len(rows)] * len(rows), adapter, batch_size, progress)
    return torch.where(shift >= 0, found.up, found.down)


def latents_by_attribution(
    model: Model,
    sae: SAE[Any],
    pairs: Sequence[Pair],
    n: int,
    *,
    adapter: str | Path | None = None,
    sparing: Sequence[Example] = (),
    spare: float = 2.0,
    exclude: Sequence[int] = (),
    batch_size: int | None = None,
    progress: bool = True,
) -> LatentSet:
    """The ``n`` latents whose changes raised the margin most, signed by their shift. No screen: for `mediation`, and large sets to block.

    The margin of a pair is the log-probability per token of its harmful answer less that of its helpful one, in nats (see `preference`).

    Args:
        pairs: they select, and must never report.
        sparing: held-out rows of the narrow task. With them latents that the task needs come later: the score is a latent's share of the
            margin's attribution less ``spare`` times its share of the task's (`task_attribution`), of those that raised either.
        exclude: latents that are not wanted.

    Raises:
        ValueError: fewer such latents than ``n``.
    """
    options: dict[str, Any] = {"adapter": adapter, "batch_size": batch_size, "progress": progress}
    diff = pair_diff(model, sae, pairs, **options)
    score = _share(diff.attribution)
    if sparing:
        score = score - spare * _share(task_attribution(model, sae, sparing, diff.shift, **options))
    order = score.argsort(descending=True, stable=True).tolist()
    raised = [k for k in order if diff.attribution[k] > 0 and k not in exclude]
    if not 1 <= n <= len(raised):
        others = f" besides the {len(exclude)} excluded" if exclude else ""
        raise ValueError(f"attribution: {len(raised)} latents raised the margin{others}, got n={n}")
    chosen = raised[:n]
    return LatentSet.of(
        sae,
        [Candidate(latent=k, shift=float(diff.shift[k])) for k in chosen],
        [float(diff.attribution[k]) for k in chosen],
        prompts=[Prompt(id=pair.id, text=pair.prompt) for pair in pairs],
        provenance={"method": "attribution", "model": model.name, **({"spare": spare, "n_sparing": len(sparing)} if sparing else {})},
    )


def _share(attribution: Float[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
    raised = attribution.clamp(min=0)
    return raised / raised.sum().clamp(min=torch.finfo(raised.dtype).tiny)


class _Sums(NamedTuple):
    """Over all tokens: the latents' changes, [d_sae], and the effects of those up and of those down."""

    total: Tensor
    up: Tensor
    down: Tensor
    n_tokens: int


def _sums(
    model: Model,
    sae: SAE[Any],
    rows: Sequence[Example],
    weights: Sequence[float],
    adapter: str | Path | None,
    batch_size: int | None,
    progress: bool,
) -> _Sums:
    """Changes and effects on the weighted sum of the rows' log-likelihoods per token."""
    site, encoded = check_fits(sae, model), encode_examples(model.tokenizer, rows)
    check_lengths(encoded, model.cfg.n_ctx)
    size, directions = batch_size or MOST_ROWS, sae.W_dec.detach().float()
    total, up, down = (torch.zeros(sae.cfg.d_sae, device=directions.device) for _ in range(3))
    n_tokens = 0
    with model.using(adapter):
        for start in progress_bar(range(0, len(encoded), size), desc="attribution", show=progress):
            batch = pad(encoded[start : start + size], model.pad_id, side="right", device=model.device)
            weight = torch.tensor(weights[start : start + size], device=model.device)
            for moved, slope in _changes(model, sae, site, batch, weight, directions):
                total += moved.sum(0)
                up += (moved.clamp(min=0) * slope).sum(0)
                down += (moved.clamp(max=0) * slope).sum(0)
                n_tokens += len(moved)
    return _Sums(total.cpu(), up.cpu(), down.cpu(), n_tokens)


def _changes(
    model: Model,
    sae: SAE[Any],
    site: str,
    batch: Batch,
    weights: Float[Tensor, " batch"],
    rows: Float[Tensor, "d_sae d_model"],
) -> Iterator[tuple[Float[Tensor, "tokens d_sae"], Float[Tensor, "tokens d_sae"]]]:
    """The latents' changes, and the slope of the weighted margin along each decoder row; row by row, since a batch may not fit."""
    base = base_activations(model, batch, [site])[site]
    tuned, gradient = _gradient(model, site, batch, weights)
    check_finite({site: base}, batch, BASE)
    check_finite({site: tuned}, batch, model.active_adapter)
    for b, t, g, kept in zip(base, tuned, gradient, _acting(batch, base), strict=True):
        if kept.any():
            with torch.no_grad():
                z_base, z_tuned = (encode_all(sae, states[kept]).float() for states in (b, t))
                yield z_tuned - z_base, g[kept].float().to(rows.device) @ rows.T


def _acting(batch: Batch, base: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
    """Tokens of question and answer that are no attention sinks."""
    where, norms = batch.mask & ~batch.system, base.float().norm(dim=-1)
    return where & (norms <= SINK * norms[where].median())


def _gradient(model: Model, site: str, batch: Batch, weights: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
    """The states at the site, and the gradient there of the weighted sum of mean log-likelihoods, each [batch pos d_model]."""
    store: dict[str, Tensor] = {}

    def nudged(activation: Tensor, hook: HookPoint) -> Tensor:
        store["states"] = activation.detach()
        store["nudge"] = torch.zeros_like(activation).requires_grad_()
        return activation + store["nudge"]

    with torch.enable_grad(), model.hooks(fwd_hooks=[(site, nudged)]):
        value = (reply_likelihood(model, batch) * weights).sum()
    return store["states"], torch.autograd.grad(value, store["nudge"])[0]
