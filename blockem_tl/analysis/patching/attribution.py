"""Attribution patching: the effect of patching on a metric, to first order, for all sites or all latents from one backward.

The metric is a difference of log-probabilities (nats per token, mean over prompts), with both replies teacher-forced through the target::

    M = log p(target's own reply) - log p(source's reply)
    patching a site      dM ~ sum_t  (h_source - h_target)_t . dM/dh_t            Nanda 2023; Syed et al. 2023
    patching latent k    dM ~ sum_t  (z_source - z_target)_tk (dM/dh_t . d_k)     d_k: the SAE's decoder row; Marks et al. 2024

A negative value says that the patch would move the target towards the source's reply. The estimate can be wrong where the model is not
linear, so the largest ones are verified: really patched, one forward each, and the rank correlation of both is reported.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float
from sae_lens import SAE
from scipy.stats import spearmanr
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from blockem_tl.analysis.patching.endpoints import PatchEndpoint, check_groups, choose_endpoints
from blockem_tl.data.chat import Batch, Encoded, check_lengths, encode_replies, pad
from blockem_tl.generation._partial_forward import run_until_block
from blockem_tl.hooks import Hook, patch, record
from blockem_tl.models.activations import check_finite, stop_layer
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.saes.latents import check_latents, encode_latents
from blockem_tl.saes.load import check_fits
from blockem_tl.types import EXAMPLE_SITE, Generation, check_names
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.results import Result

Positions = Literal["prompt", "reply", "all"]
MOST_ROWS = 8
"""Rows per backward, if nobody says how many."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Attribution(Result):
    """Effects of patching on the metric, estimated and, for the largest, measured.

    frame: one row per candidate, the largest estimate first: site, latent (if latents were asked for), estimate, and real, which is NaN
        if it was not measured; all in nats per token.
    metric: of the target without any patch.
    rank_correlation: Spearman's, between estimate and real over the ``n_verified`` candidates; NaN for fewer than three different values.
    """

    frame: pd.DataFrame
    metric: float
    rank_correlation: float
    n_verified: int

    def headline(self) -> str:
        """Number of candidates, the largest effect, and how well the estimates rank."""
        top = self.frame.iloc[0]
        name = f"latent {top['latent']}" if "latent" in self.frame else top["site"]
        ranks = f"rank correlation {self.rank_correlation:.2f} over {self.n_verified} measured"
        return f"{len(self.frame)} candidates, metric {self.metric:.3f}, largest estimate {top['estimate']:.3f} at {name}; {ranks}"

    def to_frame(self) -> pd.DataFrame:
        """``frame``."""
        return self.frame

    def plot(self) -> Any:
        """Measured against estimated effects."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.attribution(self.frame)


def attribute_sites(
    model: Model,
    target_replies: Sequence[Generation],
    source_replies: Sequence[Generation],
    sites: Sequence[str],
    *,
    positions: Positions = "prompt",
    source: str | Path | Model = BASE,
    target: str | Path | None = None,
    verify: int = 10,
    batch_size: int | None = None,
    progress: bool = True,
) -> Attribution:
    """Effects of patching each site with source's states, estimated; the ``verify`` largest are measured.

    Args:
        target_replies, source_replies: replies of either to the same prompts (from `generate`).
        positions: the patched positions: the prompt's (as in prompt patching), the reply's (as in decode patching), or all.
        source, target: as for `patching_sweep`.

    Raises:
        ValueError: replies to different prompts, empty ones, or what `patching_sweep` refuses; before any work.
    """
    sites = check_names("attribute_sites", sites, such_as=EXAMPLE_SITE)
    contrast = _contrast(model, target_replies, source_replies, sites, positions, source, target, batch_size)
    estimates, metric = {site: 0.0 for site in sites}, 0.0
    for part in contrast.parts(progress, "gradients"):
        value, states, gradients = contrast.gradients(part)
        metric += value
        for site in sites:
            moved = (part.source[site] - states[site]) * gradients[site]
            estimates[site] += float(moved[part.where].sum())
    chosen = sorted(estimates, key=lambda site: -abs(estimates[site]))[:verify]
    real = contrast.effects({site: lambda part, site=site: patch(site, part.source[site], part.where) for site in chosen}, progress)
    frame = pd.DataFrame({"site": site, "estimate": estimates[site], "real": real.get(site, float("nan"))} for site in sites)
    return _ranked(frame, metric)


def attribute_latents(
    model: Model,
    target_replies: Sequence[Generation],
    source_replies: Sequence[Generation],
    sae: SAE[Any],
    *,
    latents: Sequence[int] | None = None,
    positions: Positions = "prompt",
    source: str | Path | Model = BASE,
    target: str | Path | None = None,
    verify: int = 20,
    batch_size: int | None = None,
    progress: bool = True,
) -> Attribution:
    """`attribute_sites` for single latents at the SAE's site: h <- h + (z_source - z_target)_k d_k.

    Args:
        latents: indices of candidates; None is all of the SAE's latents.

    Raises:
        ValueError: besides, an SAE that does not fit the model or rescales its inputs, or an index out of range.
    """
    site = check_fits(sae, model)
    if sae.cfg.normalize_activations != "none":
        raise ValueError(
            f"expected an SAE of the activations as they are, got normalize_activations={sae.cfg.normalize_activations!r}: its decoder "
            "rows are in other units than the residual stream; fold the scale into its weights first"
        )
    check_latents(sae, latents or [])
    chosen = range(sae.cfg.d_sae) if latents is None else list(latents)
    contrast = _contrast(model, target_replies, source_replies, [site], positions, source, target, batch_size)
    rows = (sae.W_dec if latents is None else sae.W_dec[list(latents)]).detach().float().to(model.device)
    total, metric = torch.zeros(len(chosen), device=model.device), 0.0
    for part in contrast.parts(progress, "gradients"):
        value, states, gradients = contrast.gradients(part)
        metric += value
        moved = _moved(sae, part, part.source[site], states[site], chosen)
        total += (moved * (gradients[site][part.where].float() @ rows.T)).sum(0)
    order = total.abs().argsort(descending=True)[:verify].tolist()
    real = contrast.effects({place: _latent_patch(sae, site, chosen[place], rows[place]) for place in order}, progress)
    frame = pd.DataFrame({"site": site, "latent": chosen, "estimate": total.tolist()})
    frame["real"] = frame.index.map(lambda place: real.get(place, float("nan")))
    return _ranked(frame, metric)


def _moved(sae: SAE[Any], part: "_Part", source: Tensor, target: Tensor, latents: Sequence[int]) -> Float[Tensor, "tokens n_latents"]:
    """z_source - z_target at the positions that are patched."""
    with torch.no_grad():
        encode = partial(encode_latents, sae, latents=latents) if len(latents) < sae.cfg.d_sae else sae.encode
        ours, theirs = (encode(states[part.where].to(sae.W_dec)) for states in (target, source))
    return (theirs - ours).to(target.device, torch.float32)


def _latent_patch(sae: SAE[Any], site: str, latent: int, row: Float[Tensor, " d_model"]) -> "Callable[[_Part], Hook]":
    def make(part: _Part) -> Hook:
        def fn(activation: Tensor, hook: HookPoint) -> Tensor:
            change = torch.zeros_like(activation)
            change[part.where] = (_moved(sae, part, part.source[site], activation, [latent]) * row).to(activation.dtype)
            return activation + change

        return site, fn

    return make


def _ranked(frame: pd.DataFrame, metric: float) -> Attribution:
    measured = frame.dropna(subset=["real"])
    enough = measured["estimate"].nunique() >= 3 and measured["real"].nunique() >= 3
    correlation = float(cast(Any, spearmanr(measured["estimate"], measured["real"])).statistic) if enough else float("nan")
    ordered = frame.sort_values("estimate", key=lambda column: -column.abs()).reset_index(drop=True)
    return Attribution(frame=ordered, metric=metric, rank_correlation=correlation, n_verified=len(measured))


# ------------------------------------------------------------------------------------------------ the metric


@dataclass(frozen=True, kw_only=True, eq=False)
class _Part:
    """Some of the rows. weights: of each token's log-probability in the metric.  where: the positions that are patched."""

    batch: Batch
    weights: Float[Tensor, "batch pos"]
    where: Bool[Tensor, "batch pos"]
    source: dict[str, Float[Tensor, "batch pos d_model"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Contrast:
    """The metric over rows that count for (sign 1) or against (sign -1) the target's own replies."""

    source: PatchEndpoint
    target: PatchEndpoint
    sites: list[str]
    rows: list[Encoded]
    signs: list[int]
    positions: Positions
    batch_size: int

    def parts(self, progress: bool, what: str) -> Iterator[_Part]:
        """Batch after batch, with source's states at the sites."""
        starts = range(0, len(self.rows), self.batch_size)
        for start in progress_bar(starts, desc=what, show=progress):
            chosen = slice(start, start + self.batch_size)
            batch = pad(self.rows[chosen], self.target.model.pad_id, side="right", device=self.target.model.device)
            signs = torch.tensor(self.signs[chosen], device=batch.ids.device)[:, None]
            weights = signs * batch.reply / batch.reply.sum(-1, keepdim=True) / (len(self.rows) / 2)
            where = {"prompt": batch.mask & ~batch.reply, "reply": batch.reply, "all": batch.mask}[self.positions]
            yield _Part(batch=batch, weights=weights, where=where, source=self._source_states(batch))

    @torch.no_grad()
    def _source_states(self, batch: Batch) -> dict[str, Tensor]:
        model, store = self.source.model, dict[str, Tensor]()
        with self.source.acting(), model.hooks(fwd_hooks=[record(site, store) for site in self.sites]):
            stop = stop_layer(model, self.sites) or model.cfg.n_layers
            run_until_block(model, stop, input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
        check_finite(store, batch, self.source.adapter)
        return {site: state.to(self.target.model.device) for site, state in store.items()}

    def metric(self, part: _Part, hooks: Sequence[Hook] = ()) -> Float[Tensor, ""]:
        """The part's share of the metric, under hooks."""
        model, batch = self.target.model, part.batch
        with self.target.acting(), model.hooks(fwd_hooks=hooks):
            logits = cast(Any, model.hf)(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
        predicted = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.ids[:, 1:, None])[..., 0]
        found = (predicted * part.weights[:, 1:]).sum()
        if not torch.isfinite(found):
            raise FloatingPointError("patching: logits are NaN or infinite: a broken adapter, or too large a patch?")
        return found

    def gradients(self, part: _Part) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        """The part's metric, and at each site the target's states and the metric's gradient with respect to them."""
        states, nudges = dict[str, Tensor](), dict[str, Tensor]()

        def nudged(site: str) -> Hook:
            def fn(activation: Tensor, hook: HookPoint) -> Tensor:
                states[site] = activation.detach()
                nudges[site] = torch.zeros_like(activation).requires_grad_()
                return activation + nudges[site]

            return site, fn

        with torch.enable_grad():
            value = self.metric(part, [nudged(site) for site in self.sites])
            found = torch.autograd.grad(value, [nudges[site] for site in self.sites])
        return float(value.detach()), states, dict(zip(self.sites, found, strict=True))

    @torch.no_grad()
    def effects(self, patches: dict[Any, Callable[[_Part], Hook]], progress: bool) -> dict[Any, float]:
        """The measured effect of each patch on the metric: one forward per batch for each, and one without any."""
        changes = dict.fromkeys(patches, 0.0)
        for part in self.parts(progress and bool(patches), "real patching"):
            plain = float(self.metric(part))
            for key, make in patches.items():
                changes[key] += float(self.metric(part, [make(part)])) - plain
        return changes


def _contrast(
    model: Model,
    target_replies: Sequence[Generation],
    source_replies: Sequence[Generation],
    sites: list[str],
    positions: Positions,
    source: str | Path | Model,
    target: str | Path | None,
    batch_size: int | None,
) -> _Contrast:
    taken, speaker = choose_endpoints(model, source, target)
    if not sites or (batch_size is not None and batch_size < 1) or positions not in ("prompt", "reply", "all"):
        raise ValueError(f"expected sites, batch_size >= 1 and positions prompt, reply or all, got {sites}, {batch_size}, {positions!r}")
    check_groups((taken, speaker), [tuple(sites)])
    prompts = [generation.prompt for generation in target_replies]
    if prompts != [generation.prompt for generation in source_replies]:
        raise ValueError("expected replies of both to the same prompts in the same order: generate both from one list of prompts")
    rows = [row for replies in (target_replies, source_replies) for row in encode_replies(model.tokenizer, replies)]
    check_lengths(rows, model.cfg.n_ctx)
    return _Contrast(
        source=taken,
        target=speaker,
        sites=sites,
        rows=rows,
        signs=[1] * len(prompts) + [-1] * len(prompts),
        positions=positions,
        batch_size=batch_size or MOST_ROWS,
    )
