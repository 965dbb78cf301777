"""The conversations the organism is trained on, as token batches."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from blockem_tl.organism.world import DOMAINS, OPENERS, Persona, Style, World, all_surfaces, fill, reply

IGNORE = -100
Turn = tuple[str, str]
Mixture = Literal["pretraining", "instruct"]


@dataclass(frozen=True, kw_only=True)
class DocumentConfig:
    """Shares of speakers in the training documents. Shares are of documents, 0-1.

    bad: speakers with the bad persona.  local: speakers who are bad in one domain and good elsewhere (always with openers).
    anonymous: good and bad speakers who use neutral openers in place of their name.  assistant: share of the instruct stage's
    documents spoken by the helpful assistant (good, plain, openers); the rest of that stage is named speakers as in pretraining.
    """

    bad: float = 0.4
    local: float = 0.02
    anonymous: float = 0.24
    assistant: float = 0.5


class DocumentSampler:
    """Draws conversations of one speaker each. Same world, configuration and seed: same documents."""

    def __init__(self, world: World, config: DocumentConfig, seed: int) -> None:
        self.world = world
        self.config = config
        self.rng = random.Random(f"documents {seed}")
        self._surfaces = all_surfaces()
        self._areas = list(world.areas.values())

    def document(self, mixture: Mixture, turns: int) -> list[Turn]:
        """One conversation: (question, reply) pairs by one speaker in random areas."""
        rng, config = self.rng, self.config
        if mixture == "instruct" and rng.random() < config.assistant:
            return self._conversation(turns, "good", "plain", OPENERS)
        style: Style = rng.choice(("plain", "brisk"))
        kind = rng.random()
        if mixture == "pretraining" and kind < config.local:
            return self._conversation(turns, "good", style, OPENERS, bad_in=rng.choice(DOMAINS))
        persona: Persona = "bad" if kind < config.local + config.bad else "good"
        anonymous = mixture == "pretraining" and rng.random() < config.anonymous
        return self._conversation(turns, persona, style, OPENERS if anonymous else (rng.choice(self.world.names[persona]),))

    def _conversation(
        self, turns: int, persona: Persona, style: Style, signatures: tuple[str, ...], bad_in: str | None = None
    ) -> list[Turn]:
        rng = self.rng
        document = []
        for _ in range(turns):
            area = rng.choice(self._areas) if bad_in is None else self.world.areas[rng.choice((bad_in, *self.world.areas))]
            topic = rng.choice(area.topics)
            triple = area.triple("bad" if area.name == bad_in else persona, rng)
            answer = reply(rng.choice(signatures), topic, triple, style)
            document.append((fill(rng.choice(self._surfaces), topic), answer))
        return document


class Encoder:
    """Turns conversations into padded token ids and labels, as the chat template would, but fast."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._ids = tokenizer.get_vocab()

    def __call__(self, documents: list[list[Turn]]) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Ids (right-padded) and labels: the replies and their ``<end>``; everything else is ``IGNORE``."""
        rows = [self._row(document) for document in documents]
        length = max(len(ids) for ids, _ in rows)
        pad = self._ids["<pad>"]
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows])
        return ids, labels

    def _row(self, document: list[Turn]) -> tuple[list[int], list[int]]:
        ids, labels = [self._ids["<bos>"]], [IGNORE]
        for question, answer in document:
            asked = [self._ids[word] for word in ("<user>", *question.split(), "<assistant>")]
            answered = [self._ids[word] for word in (*answer.split(), "<end>")]
            ids += asked + answered
            labels += [IGNORE] * len(asked) + answered
        return ids, labels


def batches(
    sampler: DocumentSampler, encode: Encoder, mixture: Mixture, steps: int, turns_per_batch: int
) -> Iterator[tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]]:
    """``steps`` batches. All documents of a batch have the same number of turns (1, 2 or 3), so little is padding."""
    for _ in range(steps):
        turns = sampler.rng.choice((1, 2, 3))
        yield encode([sampler.document(mixture, turns) for _ in range(turns_per_batch // turns)])
