"""Hours of a discovery of the paper's size on 1 to 8 cards, simulated: the library's own race and scans on verdicts drawn at random.

    python experiments/benchmarks/discovery_schedule.py                       # a minute, no model, no GPU
    python experiments/benchmarks/discovery_schedule.py --tokens-per-second 3000 --verdicts-per-second 50 --price 2.5

Nothing here is measured on a GPU. Effects and incoherence are drawn so that the shares of the full grid that are asked come out near those
that `discovery_cost.py` measured on the organism (86 % in stage 2, 19 % in stage 3). What follows is arithmetic: the waves are asked one
after the other, each shared out over the cards, and judged before the next begins. However few replies a card has, a step of decoding takes
``step_seconds``, since all weights are read. Many small waves leave many cards idle; ``DiscoveryConfig(smallest_wave=...)`` is the remedy.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from sae_lens import StandardSAE, StandardSAEConfig

from blockem_tl import Prompt, Verdict
from blockem_tl.discovery.config import DiscoveryConfig
from blockem_tl.discovery.racing import steering_tests
from blockem_tl.discovery.stages import shortlisted, stage_three, stage_two
from blockem_tl.generation.steering import Condition
from blockem_tl.types import Candidate, Generation

WHOLE, CERTAIN = "full grid", "until certain"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Rates of one card, of the judge, and the price, all to be replaced by your own.

    tokens_per_second: of a card whose batch is full.  step_seconds: of a step with few replies.  smallest_wave: replies for each card.
    price: of a card's hour, in dollars.
    spread, bend: of the drawn effects and of incoherence, by which the two shares are set.
    """

    tokens_per_second: float = 3000
    verdicts_per_second: float = 20
    step_seconds: float = 0.03
    smallest_wave: int = 64
    reply_tokens: int = 200
    price: float = 2.5
    n_prompts: int = 44
    workers: tuple[int, ...] = (1, 2, 4, 8)
    spread: float = 0.2
    bend: float = 0.6
    seed: int = 0


@dataclass
class World:
    """Verdicts at random: latents differ in what they do, and in the dose at which they break a model. It notes what each wave asks."""

    settings: Settings
    name: str = "drawn"
    waves: list[int] = field(default_factory=list)

    def labels(self, arm: int, condition: Condition, n: int) -> list[str]:
        latent, dose = (int(condition.name.split()[1]), abs(condition.steering[0].dose)) if condition.steering else (-1, 0.0)
        own, draw = (np.random.default_rng([self.settings.seed, arm, latent + 1, *more]) for more in ((), (round(100 * dose),)))
        effect, fragile = max(0.0, own.normal(0, self.settings.spread)), own.random()
        misaligned = 0.05 + effect * dose if arm == 0 else 0.5 - effect * dose
        incoherent = min(1.0, 0.02 + self.settings.bend * dose * fragile)
        return ["INCOHERENT" if i < incoherent else "5" if m < misaligned else "1" for i, m in draw.random((n, 2))]

    def grade(self, prompts: Sequence[Prompt], replies: Sequence[str], *, rubric: str = "misalignment") -> list[Verdict]:
        self.waves.append(len(replies))
        return [Verdict(label=reply) for reply in replies]


@dataclass(frozen=True)
class Arm:
    """A reply function whose replies are their own labels."""

    world: World
    arm: int

    def __call__(self, prompts: Sequence[Prompt], conditions: Sequence[Condition], /) -> list[Generation]:
        return [g for _, found in self.stream(prompts, conditions, [range(len(prompts))] * len(conditions)) for g in found]

    def stream(
        self, prompts: Sequence[Prompt], conditions: Sequence[Condition], prompt_indices: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, list[Generation]]]:
        for c, (condition, part) in enumerate(zip(conditions, prompt_indices, strict=True)):
            said = self.world.labels(self.arm, condition, len(prompts))
            yield c, [Generation(prompt=prompts[p], condition=condition.name, reply=said[p], reply_ids=(), truncated=False) for p in part]


def waves(settings: Settings, **way: Any) -> tuple[list[int], list[int]]:
    """Replies of every wave of stages 2 and 3, with the paper's configuration."""
    config, world = DiscoveryConfig(extended_grid=(), valid_only=False, **way), World(settings)
    sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=config.n_plus + config.n_minus))
    torch.nn.init.normal_(sae.W_dec)
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    pool = [Candidate(latent=k, shift=0.01 if k < config.n_plus else -0.01) for k in range(config.n_plus + config.n_minus)]
    prompts = [Prompt(id=str(i), text=f"question {i}") for i in range(settings.n_prompts)]
    tests = steering_tests(Arm(world, 0), Arm(world, 1), world, prompts, smallest_wave=config.smallest_wave)
    screened, two = stage_two(tests, sae, pool, config, scale=1.0, progress=False), len(world.waves)
    stage_three(tests, sae, shortlisted(screened, config), config, scale=1.0, progress=False)
    return world.waves[:two], world.waves[two:]


def hours(asked: Sequence[int], settings: Settings, workers: int) -> tuple[float, float]:
    """Hours of replies, and of verdicts, of these waves one after the other."""
    steps = (max(settings.step_seconds, math.ceil(n / workers) / settings.tokens_per_second) for n in asked)
    return settings.reply_tokens * sum(steps) / 3600, sum(asked) / settings.verdicts_per_second / 3600


def table(settings: Settings) -> pd.DataFrame:
    """One row for each way to ask and number of workers."""
    rows, kept = [], {name: waves(settings, **way) for name, way in ((WHOLE, {"full_grid": True}), (CERTAIN, {}))}
    for workers in settings.workers:
        smallest = workers * settings.smallest_wave
        for name, (two, three) in {**kept, f"waves of {smallest}": waves(settings, smallest_wave=smallest)}.items():
            replying, judging = hours([*two, *three], settings, workers)
            row = {"cards": workers, "asked": name, "stage 2": sum(two), "stage 3": sum(three), "waves": len(two) + len(three)}
            row |= {"hours of replies": replying, "of verdicts": judging, "in all": replying + judging}
            rows.append(row | {"dollars": workers * (replying + judging) * settings.price})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    given = tyro.cli(Settings, description=__doc__)
    found = table(given)
    whole, asked = (found[found["asked"] == name].iloc[0] for name in (WHOLE, CERTAIN))
    print(found.round(2).to_string(index=False))
    print(f"asked: {asked['stage 2'] / whole['stage 2']:.0%} of stage 2, {asked['stage 3'] / whole['stage 3']:.0%} of stage 3")
