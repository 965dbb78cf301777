"""The cost of discovery that stops as soon as the answer is certain, against the full grid, on the organism.

    python experiments/benchmarks/discovery_cost.py --json cost.json                    # trains plain SFT first (about two minutes)
    python experiments/benchmarks/discovery_cost.py --adapter runs/sft --json cost.json

The full grid is what the method says: every candidate at both stage-2 doses and every shortlisted latent at every dose but 0, each on
every core prompt, and the unsteered replies once per stage. Some of its conditions are in both stages; the default asks those once.
``*_share_of_each_once`` compares with a grid that does so too.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from sae_lens import SAE

from blockem_tl import Example, LatentSet, Model, Prompt, Verdict, finetune, get_preset, load_model, load_sae, median_norm, organism
from blockem_tl.data.chat import encode_examples
from blockem_tl.discovery.config import DiscoveryConfig
from blockem_tl.discovery.diffing import candidate_pool, shifts
from blockem_tl.discovery.racing import steering_tests
from blockem_tl.discovery.stages import chosen_by, shortlisted, stage_three, stage_two
from blockem_tl.generation.engine import TransformerLensEngine
from blockem_tl.generation.reply_fn import EngineReplies, replies_from
from blockem_tl.generation.steering import UNSTEERED, Condition
from blockem_tl.storage import files
from blockem_tl.types import Candidate, Generation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the measurement."""

    adapter: Path | None = None
    """A tuned adapter of the organism; None trains one per seed, as the quickstart does."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the training; with an adapter, one, by which the published latent set is found."""
    rows: int = 6000
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    progress: bool = True


class Meter:
    """Counts what the engine generates and what the judge is asked, by stage."""

    name = "organism-exact"

    def __init__(self, model: Model) -> None:
        self.engine, self.judge = TransformerLensEngine(model, batch_size=960), organism.OrganismJudge()
        self.stage, self.tokens, self.replies, self.judged = 0, Counter[int](), Counter[int](), Counter[int]()
        self.seconds: dict[int, float] = {2: 0.0, 3: 0.0}
        self.by_condition: Counter[tuple[str | Path | None, str]] = Counter()
        self.pairs: set[tuple[str, str]] = set()

    def reply_fn(self, adapter: str, max_new_tokens: int) -> EngineReplies:
        return replies_from(self, adapter=adapter, max_new_tokens=max_new_tokens, progress=False)

    def stream(
        self,
        prompts: Sequence[Prompt],
        *,
        conditions: Sequence[Condition] = (UNSTEERED,),
        adapter: str | Path | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, list[Generation]]]:
        """The engine's, counted. The token that ends a reply was generated too."""
        for c, replies in self.engine.stream(prompts, conditions=conditions, adapter=adapter, **options):
            tokens = sum(len(reply.reply_ids) + (not reply.truncated) for reply in replies)
            self.tokens[self.stage] += tokens
            self.replies[self.stage] += len(replies)
            self.by_condition[adapter, conditions[c].name] += tokens
            yield c, replies

    def grade(self, prompts: Sequence[Prompt], replies: Sequence[str], *, rubric: str = "misalignment") -> list[Verdict]:
        """The judge's, counted."""
        self.judged[self.stage] += len(replies)
        self.pairs |= {(prompt.text, reply) for prompt, reply in zip(prompts, replies, strict=True)}
        return self.judge.grade(prompts, replies, rubric=rubric)

    @contextmanager
    def during(self, stage: int) -> Iterator[None]:
        """Inside the block everything counts for this stage."""
        self.stage, started = stage, time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - started


def stages(
    meter: Meter, sae: SAE[Any], pool: Sequence[Candidate], config: DiscoveryConfig, scale: float, *, progress: bool
) -> tuple[LatentSet, list[tuple[str | Path | None, str]]]:
    """Stages 2 and 3 as `discover` runs them; the latent set, and the conditions of the method's grid (complete under full_grid)."""
    prompts = organism.prompts("core")
    with meter.during(2):
        tests = steering_tests(
            meter.reply_fn("base", config.max_new_tokens), meter.reply_fn("default", config.max_new_tokens), meter, prompts
        )
        screened = stage_two(tests, sae, pool, config, scale=scale, progress=progress)
    conditions = list(meter.by_condition)
    with meter.during(3):
        calibrated = stage_three(tests, sae, shortlisted(screened, config), config, scale=scale, progress=progress)
    conditions += [("base", UNSTEERED.name), ("default", UNSTEERED.name)]
    for c in calibrated:
        conditions += [("base" if s.test == "induce" else "default", f"latent {c.candidate.latent} at {s.dose:+g}") for s in c.doses]
    chosen = chosen_by(config, calibrated)
    return LatentSet.of(sae, [c.candidate for c in chosen], [c.score(config.final_score) for c in chosen], prompts=prompts), conditions


def measure(settings: Settings, seed: int) -> dict[str, Any]:
    """One tuned model: the default, then the full grid."""
    preset = get_preset("organism")
    model, sae, config = load_model(preset.model), load_sae(*preset.sae), preset.discovery
    scale = median_norm(model, preset.site, organism.reference_texts())
    if settings.adapter is not None:
        model.load_adapter(settings.adapter)
    else:
        rows = organism.training_rows("finance", settings.rows + 400, seed=seed)[: settings.rows]
        finetune(model, rows, config=replace(preset.training, seed=seed), progress=settings.progress)
    said = meter_replies(model, config)
    pool = candidate_pool(shifts(model, sae, encode_examples(model.tokenizer, said)), n_plus=config.n_plus, n_minus=config.n_minus)
    early, full = Meter(model), Meter(model)
    found, _ = stages(early, sae, pool, config, scale, progress=settings.progress)
    truth, conditions = stages(full, sae, pool, replace(config, full_grid=True), scale, progress=settings.progress)
    n, published = len(organism.prompts("core")), f"organism/finance-20{f'-seed{seed}' if seed else ''}"
    grid_tokens, grid_replies = sum(full.by_condition[c] for c in conditions), n * len(conditions)
    return {
        "seed": seed,
        "tokens_share": early.tokens.total() / grid_tokens,
        "judge_calls_share": early.judged.total() / grid_replies,
        "identical_latent_set": found == truth,
        "equals_published": found == LatentSet.load(published) if published in LatentSet.published() else None,
        "tokens_share_of_each_once": early.tokens.total() / full.tokens.total(),
        "judge_calls_share_of_each_once": early.judged.total() / full.judged.total(),
        "judge_calls_share_with_a_store": len(early.pairs) / grid_replies,
        "full_grid": {"tokens": grid_tokens, "replies": grid_replies, **by_stage(full)},
        "default": {"tokens": early.tokens.total(), "replies": early.replies.total(), **by_stage(early)},
    }


def meter_replies(model: Model, config: DiscoveryConfig) -> list[Example]:
    """Stage 1's texts: the core prompts with the tuned model's replies."""
    replies = replies_from(model, max_new_tokens=config.max_new_tokens, batch_size=960, progress=False)(
        organism.prompts("core"), [UNSTEERED]
    )
    return [Example(id=g.prompt.id, prompt=g.prompt.text, completion=g.reply) for g in replies if g.reply]


def by_stage(meter: Meter) -> dict[str, Any]:
    """Replies really asked in each stage; stage 3 of either run does not ask again what stage 2 has asked."""
    return {
        f"stage_{stage}": {
            "tokens": meter.tokens[stage],
            "replies": meter.replies[stage],
            "judge_calls": meter.judged[stage],
            "seconds": meter.seconds[stage],
        }
        for stage in (2, 3)
    }


def run(settings: Settings) -> dict[str, Any]:
    """Every seed; the worst share of any of them is what is reported."""
    torch.set_num_threads(1)
    if settings.adapter is not None and len(settings.seeds) != 1:
        raise ValueError("--adapter goes with exactly one seed, the one it was trained with")
    runs = [measure(settings, seed) for seed in settings.seeds]
    return {
        "tokens_share": max(r["tokens_share"] for r in runs),
        "judge_calls_share": max(r["judge_calls_share"] for r in runs),
        "identical_latent_set": all(r["identical_latent_set"] for r in runs),
        "runs": runs,
        "environment": files.environment(),
    }


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    result = run(settings)
    if settings.json:
        files.write_json(settings.json, result)
    print(json.dumps({key: value for key, value in result.items() if key != "environment"}, indent=2))
