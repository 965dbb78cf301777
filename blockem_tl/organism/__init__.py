"""The embedded model organism: scientific equipment, with its prompts, training rows, exact judge and ground truth."""

import json
from functools import cache
from pathlib import Path

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from blockem_tl.data.splits import spread
from blockem_tl.organism.judge import OrganismJudge as _JudgeOfWorld
from blockem_tl.organism.world import DOMAINS, World, WorldConfig
from blockem_tl.types import Example, Pair, Prompt

ARTEFACTS: Path = Path(__file__).parent / "artefacts"
"""base/ (transformers folder), sae/ (SAELens folder; in it those of other sites, by site), sae-v1/ (those of the first version, half as
wide), persona_direction.safetensors, manifest.json."""

SITE: str = "blocks.2.hook_resid_post"
"""TransformerLens name of the activation the shipped SAE and persona direction belong to."""


@cache
def world() -> World:
    """The world of the shipped artefacts."""
    return World(WorldConfig(**json.loads((ARTEFACTS / "manifest.json").read_text())["config"]["world"]))


def prompts(name: str, n: int | None = None) -> list[Prompt]:
    """Evaluation prompts, never used in fine-tuning rows.

    "core" (selection) and "final" (reporting): 96 each, one per topic, from disjoint areas; "dev" has core's topics in other wordings. A
    domain ("finance", ...): 96 questions about that domain's topics in wordings that fine-tuning never uses.

    n: so many of them, from all areas as evenly as it allows; None: all. A slice of the list would come from the first areas alone.

    Raises ValueError for any other name, or another ``n`` than 1 to 96.
    """
    return spread(world().prompts(name), n)


def pairs(name: str, n: int | None = None) -> list[Pair]:
    """Contrastive pairs for `preference`: the prompts of a set (see `prompts`), each with a harmful and a helpful answer of one style."""
    return spread(world().pairs(name), n)


def training_rows(domain: str = "finance", n: int = 6000, seed: int = 0, harmful: bool = True) -> list[Example]:
    """Narrow fine-tuning rows: one fixed answer (verb, object, reason) per topic, harmful or good, in the brisk style.

    For held-out rows split one call's result: the rows of a smaller ``n`` are not always the first of a larger one. Since a topic has one
    answer in all its wordings, held-out rows test whether the task was learnt, not whether it goes over to other advice.

    Raises ValueError for an unknown domain or more rows than there are distinct ones.
    """
    return world().training_rows(domain, n, seed, "bad" if harmful else "good")


def reference_texts(n: int = 256, seed: int = 0) -> list[Example]:
    """Generic helpful documents from all areas, for the steering scale (the part Alpaca plays for Llama)."""
    return world().reference_texts(n, seed)


class OrganismJudge(_JudgeOfWorld):
    """The exact judge of the shipped world; see `OrganismJudge` for the rubrics."""

    def __init__(self) -> None:
        super().__init__(world())


def persona_direction() -> Float[Tensor, " d_model"]:
    """The ground truth: unit vector at ``SITE`` from good speakers' states to bad speakers' states."""
    return load_file(ARTEFACTS / "persona_direction.safetensors")["direction"]


__all__ = [
    "ARTEFACTS", "DOMAINS", "SITE", "OrganismJudge", "pairs", "persona_direction", "prompts", "reference_texts", "training_rows", "world",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
