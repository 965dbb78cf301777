"""A tuned model's replies with base's states patched in, site by site, judged (docs/reemergence.md).

    python experiments/patching_sweep.py --adapter results/quickstart/adapters/sft --out results/patching-sweep
    python experiments/patching_sweep.py --preset llama-3.1-8b --adapter reemerged --prompts final.csv --judge-model judge --out results/p

The prompt's states at every block's output (and, with --components, at every attention's and MLP's), then decode patching at the
preset's site. What is finished stays in --out and is not run again. The organism's default prompts are the core ones.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
import tyro

from blockem_tl import Generation, get_preset, load_model, organism
from blockem_tl.analysis.patching.decoding import decode_patching
from blockem_tl.analysis.patching.endpoints import UNPATCHED
from blockem_tl.analysis.patching.prompt import prompt_patching_stream
from blockem_tl.data.chat import apply_system
from blockem_tl.data.prompt_files import load_prompts
from blockem_tl.evaluation.statistics import Rate
from blockem_tl.judging.endpoint import Endpoint
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.storage import files
from blockem_tl.types import Counts, Judge, Prompt, Verdict
from blockem_tl.views import plots, tables


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the sweep.

    adapter: of the fine-tuned model.  prompts: a file, or the organism's "core" or "final".  direction: base's states into tuned, or the
    reverse.  decode: sites of decode patching besides; None is the preset's.  max_new_tokens: None is the preset's.
    judge_model, judge_url: the judging endpoint; the organism has a judge of its own.
    """

    adapter: Path
    out: Path
    preset: str = "organism"
    prompts: str = "core"
    direction: Literal["base-into-tuned", "tuned-into-base"] = "base-into-tuned"
    components: bool = False
    decode: tuple[str, ...] | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None
    temperature: float = 0.0
    seed: int = 0
    judge_model: str | None = None
    judge_url: str = "http://127.0.0.1:8000/v1"


def run(settings: Settings) -> pd.DataFrame:
    """Run what is not there yet, then write sweep.csv and sweep.png."""
    preset, judge = get_preset(settings.preset), _judge(settings)
    folder = files.check_writable(settings.out)
    _check_same(folder / "settings.json", settings)
    prompts = apply_system(_prompts(settings), preset.system)
    model = load_model(preset.model, settings.adapter, dtype=getattr(torch, preset.dtype))
    blocks = range(model.cfg.n_layers)
    kinds = ("hook_resid_post", "hook_attn_out", "hook_mlp_out") if settings.components else ("hook_resid_post",)
    groups: list[tuple[str, ...]] = [(), *((f"blocks.{block}.{kind}",) for kind in kinds for block in blocks)]
    arms = ("base", "default") if settings.direction == "base-into-tuned" else ("default", "base")
    options: dict[str, Any] = {
        "source": arms[0],
        "target": arms[1],
        "max_new_tokens": settings.max_new_tokens or preset.max_new_tokens,
        "batch_size": settings.batch_size,
        "temperature": settings.temperature,
        "seed": settings.seed,
    }
    missing = [group for group in groups if not _file(folder, "prompt", group).is_file()]
    if missing:
        for group, generations in prompt_patching_stream(model, prompts, missing, **options):
            _keep(_file(folder, "prompt", group), generations, judge)
    decode = (preset.site,) if settings.decode is None else settings.decode
    for site in decode:
        if not _file(folder, "decode", (site,)).is_file():
            _keep(_file(folder, "decode", (site,)), decode_patching(model, prompts, [site], **options), judge)
    wanted = [("prompt", group) for group in groups] + [("decode", (site,)) for site in decode]
    frame = pd.DataFrame([_row(kind, group, files.read_json(_file(folder, kind, group))) for kind, group in wanted])
    files.write_text(folder / "sweep.csv", frame.to_csv(index=False))
    plots.save(plots.patching(frame, direction=settings.direction.replace("-", " ")), folder / "sweep.png")
    shown = frame.round(1).astype(object)
    tables.show(shown[["patched", "site", "n", "em", "em_low", "em_high", "incoherence", "refusal"]].to_dict("records"), "misalignment (%)")
    return frame


def _judge(settings: Settings) -> Judge:
    if settings.judge_model is not None:
        return LLMJudge(backend=Endpoint(model=settings.judge_model, base_url=settings.judge_url))
    if settings.preset != "organism":
        raise ValueError(f"preset {settings.preset!r} needs --judge-model: only the organism has a judge of its own")
    return organism.OrganismJudge()


def _prompts(settings: Settings) -> list[Prompt]:
    if settings.preset == "organism" and not Path(settings.prompts).is_file():
        return organism.prompts(settings.prompts)
    return load_prompts(settings.prompts)


def _check_same(path: Path, settings: Settings) -> None:
    """A folder holds one experiment: raise ValueError where it was begun with other settings."""
    asked = {key: str(value) for key, value in asdict(settings).items() if key not in ("out", "batch_size", "decode", "components")}
    if path.is_file() and (begun := files.read_json(path)) != asked:
        changed = sorted(key for key in asked if begun.get(key) != asked[key])
        raise ValueError(f"{path.parent} was begun with another {', '.join(changed)}: choose another --out, or give the old settings again")
    files.write_json(path, asked)


def _file(folder: Path, kind: str, group: tuple[str, ...]) -> Path:
    return folder / kind / f"{'+'.join(group) or UNPATCHED}.json"


def _keep(path: Path, generations: Sequence[Generation], judge: Judge) -> None:
    """One site's replies with their labels: whole or absent."""
    verdicts = judge.grade([g.prompt for g in generations], [g.reply for g in generations])
    files.write_json(
        path,
        {
            "condition": generations[0].condition,
            "rows": [
                {"prompt": g.prompt.id, "reply": g.reply, "truncated": g.truncated, "label": v.label}
                for g, v in zip(generations, verdicts, strict=True)
            ],
        },
    )


def _row(kind: str, group: tuple[str, ...], kept: dict[str, Any]) -> dict[str, Any]:
    """Rates in per cent, EM with its 95 % interval."""
    counts = Counts.of([Verdict(label=row["label"]) for row in kept["rows"]])
    em, (low, high) = Rate(k=counts.misaligned, n=counts.n), Rate(k=counts.misaligned, n=counts.n).interval
    site = " + ".join(group) or UNPATCHED
    return {
        "patched": kind if group else UNPATCHED,
        "site": site,
        "n": counts.n,
        "em": 100 * em.value,
        "em_low": 100 * low,
        "em_high": 100 * high,
        "incoherence": 100 * counts.incoherent_rate,
        "refusal": 100 * counts.refusal_rate,
    }


if __name__ == "__main__":
    torch.set_num_threads(1 if not torch.cuda.is_available() else torch.get_num_threads())
    run(tyro.cli(Settings, description=__doc__))
