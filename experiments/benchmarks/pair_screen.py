"""Screening latents on contrastive pairs against generating replies and judging them: how well the ranks agree, and what either costs.

    python experiments/benchmarks/pair_screen.py --preset organism --json pairs.json
    python experiments/benchmarks/pair_screen.py --preset smollm2-135m --adapter runs/plain --latents 32 --json pairs.json

Both screens steer base along the shift and tuned against it (stage 2), at the preset's doses, on the same questions: the core pairs'. Costs
are processor seconds.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import pandas as pd
import tyro
from scipy.stats import spearmanr

from blockem_tl import Setting, finetune, replies_from
from blockem_tl.discovery.attributing import pair_diff
from blockem_tl.discovery.by_pairs import PairTests, questions, screen_pairs
from blockem_tl.discovery.diffing import candidate_pool
from blockem_tl.discovery.racing import steering_tests
from blockem_tl.discovery.screening import Screened, screen
from blockem_tl.models.lora import BASE
from blockem_tl.storage import files
from blockem_tl.study.stages import tuned_at


@dataclass(frozen=True, kw_only=True)
class Options:
    """adapter: the tuned model, as `blockem finetune` leaves it; None trains the preset's plain fine-tune.  latents: of either sign half.
    pairs: of core; None: all."""

    preset: str = "organism"
    adapter: Path | None = None
    latents: int = 40
    pairs: int | None = None
    seed: int = 0
    json: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    progress: bool = True


def timed(work: Callable[[], list[Screened]]) -> tuple[list[Screened], float]:
    """What the work gives, and its processor seconds, which other work on the machine hardly changes."""
    start = time.process_time()
    return work(), time.process_time() - start


def table(by_pairs: list[Screened], by_judge: list[Screened]) -> pd.DataFrame:
    """One row per latent: what it induces and repairs, in nats per token and as rates."""
    return pd.DataFrame(
        {
            "latent": a.candidate.latent,
            "sign": a.candidate.sign,
            "induction_nats": a.induction,
            "repair_nats": a.repair,
            "score_nats": a.score,
            "induction_rate": b.induction,
            "repair_rate": b.repair,
            "score_rate": b.score,
        }
        for a, b in zip(by_pairs, by_judge, strict=True)
    )


def main(options: Options) -> dict[str, Any]:
    setting = Setting.of(options.preset, seed=options.seed)
    model, sae, config = setting.model, setting.sae, setting.preset.discovery
    if options.adapter is None:
        finetune(model, setting.rows(), config=setting.training, adapter="tuned", progress=options.progress)
    else:
        model.load_adapter(tuned_at(options.adapter).adapter, "tuned")
    core = setting.pairs("core")
    pairs = core[:: max(1, len(core) // (options.pairs or len(core)))]
    shift = pair_diff(model, sae, pairs, adapter="tuned", progress=options.progress).shift
    candidates = candidate_pool(shift, n_plus=options.latents // 2, n_minus=options.latents // 2)
    doses: dict[str, Any] = {"scale": setting.scale(), "induce_dose": config.induce_dose, "repair_dose": config.repair_dose}

    def judged() -> list[Screened]:
        base, tuned = (
            replies_from(model, adapter=name, max_new_tokens=config.max_new_tokens, batch_size=config.batch_size, progress=False)
            for name in (BASE, "tuned")
        )
        tests = steering_tests(base, tuned, setting.judge, questions(pairs))
        return screen(tests, sae, candidates, full_grid=True, progress=options.progress, **doses)

    def paired() -> list[Screened]:
        tests = PairTests(model, sae, pairs, "tuned", doses["scale"], config.max_incoherence.nats)
        return screen_pairs(tests, candidates, config, progress=options.progress)

    by_pairs, pair_seconds = timed(paired)
    by_judge, judge_seconds = timed(judged)
    frame = table(by_pairs, by_judge)
    found: dict[str, Any] = {"n_latents": len(frame), "n_pairs": len(pairs), "seconds_pairs": pair_seconds, "seconds_judge": judge_seconds}
    found["cost_ratio"] = judge_seconds / pair_seconds
    for what in ("induction", "repair", "score"):
        pair, rate = frame[f"{what}_nats"], frame[f"{what}_rate"]  # no rank where no latent changes any verdict
        found[f"rank_correlation_{what}"] = float(cast(Any, spearmanr(pair, rate)).statistic) if rate.nunique() > 1 else None
    print(frame.round(3).to_string(index=False), json.dumps(found, indent=2), sep="\n\n")
    if options.json is not None:
        files.write_json(
            options.json,
            {**found, "options": {name: str(value) for name, value in asdict(options).items()}, "latents": frame.to_dict("records")},
        )
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
