"""The activations that an SAE learns from: texts, chats and replies under base and tuned, without attention sinks, without end."""

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from blockem_tl.data.chat import Rows
from blockem_tl.models.activations import read_site
from blockem_tl.models.load import Model
from blockem_tl.saes.kept import KeptActivations

ROWS = 32
"""Rows that are read together."""
MOST_HELD_OUT = 64
"""Rows of a corpus at most that a card is measured on: its losses need the whole model."""


def split_corpora(corpora: Mapping[str, Rows], *, heldout: float, seed: int) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Training and held-out rows of every corpus, drawn by the seed. Raises ValueError where there is nothing to hold out."""
    train, apart = dict[str, Rows](), dict[str, Rows]()
    for name, rows in corpora.items():
        order = list(rows)
        random.Random(f"{seed} {name}").shuffle(order)
        n = min(MOST_HELD_OUT, max(1, round(heldout * len(order))))
        if len(order) - n < 1:
            raise ValueError(f"SAE: corpus {name!r} has {len(order)} rows, expected two at least, one of them to hold out")
        train[name], apart[name] = order[n:], order[:n]
    if not corpora:
        raise ValueError("SAE: expected at least one corpus of rows to read, got none")
    return train, apart


def median_of_norms(model: Model, site: str, corpora: Mapping[str, Rows], adapters: Sequence[str]) -> float:
    """The median norm over the first rows of each corpus, under each adapter."""
    norms = []
    for adapter in adapters:
        with model.using(adapter):
            for rows in corpora.values():
                norms += [states.float().norm(dim=-1) for states in _read(model, site, list(rows)[:ROWS])]
    return float(torch.cat(norms).median())


def _read(model: Model, site: str, rows: Rows) -> Iterator[Float[Tensor, "tokens d_model"]]:
    """Activations of all tokens but padding and the first of each row."""
    for activations, batch in read_site(model, site, rows):
        yield activations[batch.mask & (batch.positions > 0)]


class ActivationStream:
    """Activations of the corpora under each adapter, but for tokens with a norm above ``limit``; computed once and kept on disk.

    n_least: fewer tokens than this are too few.  kept_gb: disk for activations; what does not fit is computed every time.
    """

    def __init__(
        self,
        model: Model,
        site: str,
        corpora: Mapping[str, Rows],
        adapters: Sequence[str],
        *,
        limit: float = float("inf"),
        n_least: int = 1,
        seed: int = 0,
        kept_gb: float = 8.0,
    ) -> None:
        self.model, self.site, self.limit, self.n_least, self.seed = model, site, limit, n_least, seed
        self.parts = [
            (adapter, list(rows)[i : i + ROWS]) for adapter in adapters for rows in corpora.values() for i in range(0, len(rows), ROWS)
        ]
        self.kept = KeptActivations(1e9 * kept_gb)

    def draw(self, n: int = 0) -> Iterator[Float[Tensor, "tokens d_model"]]:
        """The ``n``-th stream, without end: a few rows of one kind under one adapter at a time, in an order drawn by seed and ``n``.

        Raises:
            ValueError: the corpora have fewer tokens than are needed.
        """
        draw, order, n_tokens = random.Random(f"{self.seed} {n}"), list(range(len(self.parts))), 0
        while True:
            draw.shuffle(order)
            for part in order:
                states = self.kept.get(part, partial(self._compute, part))
                n_tokens += len(states)
                yield states.to(self.model.device, torch.float32)
            if n_tokens < self.n_least:
                raise ValueError(
                    f"SAE: the corpora have {n_tokens} tokens for {self.n_least} latents; pass more rows (some hundred tokens per latent "
                    "are little), or a smaller d_sae"
                )

    def _compute(self, part: int) -> Float[Tensor, "tokens d_model"]:
        adapter, rows = self.parts[part]
        with self.model.using(adapter):
            return torch.cat([states[states.float().norm(dim=-1) <= self.limit] for states in _read(self.model, self.site, rows)])
