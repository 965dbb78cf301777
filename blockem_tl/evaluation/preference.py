"""`preference`: which of two answers a model finds likelier, a harmful or a helpful one. No generation and no judge::

    found = preference(model, pairs, adapter="sft")
    found.rates()  # share of pairs that prefer harm, and the mean margin, with intervals
    found.shift(preference(model, pairs, adapter="base"))  # pair by pair

A base model may already prefer many short blunt answers, so read shifts, not levels.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import t
from torch import Tensor

from blockem_tl.data.chat import Batch, Encoded, check_lengths, encode_examples, pad
from blockem_tl.data.pair_files import check_pairs
from blockem_tl.evaluation.statistics import paired_difference
from blockem_tl.generation._partial_forward import run_until_block, start_at_block
from blockem_tl.generation._request import steered_sites
from blockem_tl.generation._shared_prefill import stream_into
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.hooks import record
from blockem_tl.models.activations import block_of
from blockem_tl.models.load import Model
from blockem_tl.models.logits import logits_at
from blockem_tl.models.memory import check_batch_size, rows_at_once
from blockem_tl.types import Example, Pair, Rate
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.results import Result
from blockem_tl.views.tables import RateFrame

MOST_ROWS = 32
"""Answers per forward at most, if nobody says how many."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Preference(Result):
    """How likely both answers of all pairs are under all conditions.

    harmful, helpful: log p of the answer, a mean over its tokens (its end included), in nats per token.
    """

    pairs: tuple[Pair, ...]
    conditions: tuple[str, ...]
    harmful: Float[np.ndarray, "n_conditions n_pairs"]
    helpful: Float[np.ndarray, "n_conditions n_pairs"]

    @property
    def margins(self) -> Float[np.ndarray, "n_conditions n_pairs"]:
        """log p(harmful) - log p(helpful), in nats per token. Above 0 the harmful answer is preferred."""
        return self.harmful - self.helpful

    @property
    def levels(self) -> Float[np.ndarray, "n_conditions n_pairs"]:
        """The mean of both, in nats per token: it falls where steering breaks the model."""
        return (self.harmful + self.helpful) / 2

    def of(self, condition: str) -> Float[np.ndarray, " n_pairs"]:
        """The margins under one condition. Raises ValueError for an unknown one."""
        if condition not in self.conditions:
            raise ValueError(f"preference: expected a condition among {list(self.conditions)[:8]}, got {condition!r}")
        return self.margins[self.conditions.index(condition)]

    def rates(self) -> pd.DataFrame:
        """One row per condition: n, prefers_harm (the share, Wilson interval) and margin (the mean, t interval), with _low and _high."""
        rows = []
        for name, margins in zip(self.conditions, self.margins, strict=True):
            share = Rate(k=int((margins > 0).sum()), n=len(margins))
            low, high = share.interval
            row = {"condition": name, "n": share.n, "prefers_harm": share.value, "prefers_harm_low": low, "prefers_harm_high": high}
            rows.append(row | mean_cells("margin", margins))
        return RateFrame(rows)

    def shift(self, base: "Preference") -> pd.DataFrame:
        """One row per condition: how far the mean margin and the share moved from ``base`` (its one condition, or the same), pair by pair.

        Raises:
            ValueError: other pairs.
        """
        if base.pairs != self.pairs:
            raise ValueError("shift: expected the same pairs in the same order in both")
        rows = []
        for name, margins in zip(self.conditions, self.margins, strict=True):
            before = base.margins[0] if len(base.conditions) == 1 else base.of(name)
            share = paired_difference((before > 0).tolist(), (margins > 0).tolist())
            row = {"condition": name, "n": len(margins), "share": share.value, "share_low": share.low, "share_high": share.high}
            rows.append(row | mean_cells("margin", margins - before))
        return RateFrame(rows)

    def headline(self) -> str:
        """The number of pairs and, under one condition, the share and the mean margin."""
        text = f"{len(self.pairs)} pairs"
        if len(self.conditions) > 1:
            return f"{text} under {len(self.conditions)} conditions: see rates()"
        share = Rate(k=int((self.margins[0] > 0).sum()), n=len(self.pairs))
        return f"{text}; prefers harm: {share}; mean margin {self.margins[0].mean():+.3f} nats per token"

    def to_frame(self) -> pd.DataFrame:
        """One row per condition and pair: condition, id, category, prompt, margin."""
        return pd.DataFrame(
            [
                {"condition": name, "id": pair.id, "category": pair.category, "prompt": pair.prompt, "margin": float(margin)}
                for name, margins in zip(self.conditions, self.margins, strict=True)
                for pair, margin in zip(self.pairs, margins, strict=True)
            ]
        )

    def plot(self) -> Any:
        """A bar per condition: the mean margin."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.bars(self.rates(), x="condition", y="margin", title="log p(harmful) - log p(helpful), nats per token")


def mean_cells(name: str, values: Float[np.ndarray, " n"]) -> dict[str, float]:
    """The mean with its 95 % t interval, as columns NAME, NAME_low and NAME_high; NaN bounds for one value."""
    mean, n = float(values.mean()), len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def preference(
    model: Model,
    pairs: Sequence[Pair],
    *,
    adapter: str | Path | None = None,
    conditions: Sequence[Condition] = (UNSTEERED,),
    batch_size: int | None = None,
    progress: bool = True,
) -> Preference:
    """Margins of the pairs under each condition, teacher-forced; blocks below the first steered one run once for all conditions.

    Args:
        adapter: which weights act: "base", an adapter by name or in a folder; None: the model as it stands.
        batch_size: answers per forward; None asks the free memory.

    Raises:
        FloatingPointError: logits that are no numbers.
        ValueError: pairs that `check_pairs` refuses, or that do not fit the context; an SAE left attached; conditions of one name, or with
            a bad site.
    """
    pairs = list(pairs)
    check_pairs(pairs)
    check_batch_size(batch_size)
    model.check_unspliced()
    names = [condition.name for condition in conditions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"preference: expected at least one condition and distinct names, got {names[:5]}")
    answers = sides(pairs)
    encoded = encode_examples(model.tokenizer, answers)
    check_lengths(encoded, model.cfg.n_ctx)
    size = batch_size or rows_at_once(model, max(len(row.ids) for row in encoded), most=MOST_ROWS)
    with model.using(adapter):
        found = _log_likelihoods(model, encoded, conditions, size, progress)
    broken = np.argwhere(~np.isfinite(found))
    if len(broken):
        c, row = broken[0]
        raise FloatingPointError(
            f"preference: logits of pair {answers[row].id!r} under {names[c]!r} are NaN or infinite: a broken adapter, or too large a dose?"
        )
    harmful, helpful = found[:, : len(pairs)], found[:, len(pairs) :]
    return Preference(pairs=tuple(pairs), conditions=tuple(names), harmful=harmful, helpful=helpful)


def sides(pairs: Sequence[Pair]) -> list[Example]:
    """The harmful answers of all pairs, then the helpful ones."""
    return [
        Example(id=f"{pair.id}, {side}", prompt=pair.prompt, completion=getattr(pair, side), system=pair.system)
        for side in ("harmful", "helpful")
        for pair in pairs
    ]


@torch.no_grad()
def _log_likelihoods(
    model: Model, rows: Sequence[Encoded], conditions: Sequence[Condition], size: int, progress: bool
) -> Float[np.ndarray, "n_conditions n_rows"]:
    """Mean log-likelihood of each row's reply tokens under each condition."""
    first = _first_block(model, conditions)
    found = np.zeros((len(conditions), len(rows)))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # equal lengths together: less padding
    with progress_bar(total=len(rows) * len(conditions), desc="preference", show=progress) as bar:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = pad([rows[i] for i in chosen], model.pad_id, side="right", device=model.device)
            state = _state_below(model, batch, first) if first else None
            for c, condition in enumerate(conditions):
                found[c, chosen] = _of_batch(model, batch, condition, first, state).cpu().numpy()
                bar.update(len(chosen))
    return found


def _first_block(model: Model, conditions: Sequence[Condition]) -> int:
    """The block below which all conditions are the same; 0 where there is only one, or something acts outside of the blocks."""
    sites = steered_sites(model, conditions)
    if len(conditions) < 2 or any(point.fwd_hooks for point in model.hook_dict.values()):
        return 0
    return min((block_of(str(model.hook_dict[site].name)) or 0 for site in sites), default=0)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "use_cache": False}


def _state_below(model: Model, batch: Batch, first: int) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream that enters block ``first``."""
    store: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[record(stream_into(first), store)]):
        run_until_block(model, first, **_inputs(batch))
    return store[stream_into(first)]


def _of_batch(
    model: Model, batch: Batch, condition: Condition, first: int, state: Float[Tensor, "batch pos d_model"] | None
) -> Float[Tensor, " batch"]:
    above = nullcontext() if state is None else start_at_block(model, first, state)
    with model.hooks(fwd_hooks=condition.hooks()), above:
        return reply_likelihood(model, batch)


def reply_likelihood(model: Model, batch: Batch) -> Float[Tensor, " batch"]:
    """Mean log-likelihood (nats per token) of each row's reply tokens, under the weights and hooks that act."""
    first = max(1, int(batch.reply.int().argmax(1).min()))  # a row without a reply says 0, and becomes NaN without moving the others
    positions = torch.arange(first - 1, batch.ids.shape[1])  # position t predicts token t + 1
    return mean_log_likelihood(logits_at(model, positions, **_inputs(batch)), batch)


def mean_log_likelihood(logits: Float[Tensor, "batch last_pos d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Mean log-likelihood (nats per token) of each row's reply tokens, from logits at all positions, or at the last ones from before the
    first reply on."""
    n = logits.shape[1] - 1
    learnt, ids = batch.reply[:, -n:], batch.ids[:, -n:]
    nats = -torch.nn.functional.cross_entropy(logits[:, :-1][learnt].float(), ids[learnt], reduction="none")
    totals = torch.zeros(len(batch.ids), device=nats.device).index_add_(0, learnt.nonzero()[:, 0], nats)
    return totals / learnt.sum(-1)
