"""Patching in a study: replies with another model's states at site after site, judged, and kept as each site is done (paper F.1)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from blockem_tl.analysis.patching.decoding import decode_patching
from blockem_tl.analysis.patching.endpoints import UNPATCHED
from blockem_tl.analysis.patching.prompt import prompt_patching_stream
from blockem_tl.analysis.patching.sweep import When
from blockem_tl.generation.replies import Replies
from blockem_tl.models.activations import block_of
from blockem_tl.models.load import Model
from blockem_tl.models.lora import BASE
from blockem_tl.study import jobs, summary
from blockem_tl.study.inputs import PromptSplit
from blockem_tl.study.run import Point
from blockem_tl.study.setting import Setting
from blockem_tl.types import Generation
from blockem_tl.views.tables import RateFrame

STREAMS, COMPONENTS = ("hook_resid_post",), ("hook_resid_post", "hook_attn_out", "hook_mlp_out")


def patched_replies(
    setting: Setting,
    point: Point,
    *,
    split: PromptSplit,
    when: When,
    sites: Sequence[str] = (),
    components: bool = False,
    reverse: bool = False,
    n: int | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """One row per reply, site and judge, with its label: a step of a study. See `patching_sweep` for what is patched.

    Args:
        when: "prompt": also the unpatched replies.
        sites: hook names; by default every block's output over the prompt, and the preset's own site while decoding.
        components: over the prompt also every block's attention and MLP.
        reverse: the tuned model's states into base; by default base's into tuned.
        n: of the split's prompts.

    Raises:
        ValueError: as `patching_sweep`; before any work.
    """
    chosen = ["", *(sites or _every_block(setting.model, components))] if when == "prompt" else list(sites or [setting.site])
    names = [f"n={n}"] * (n is not None) + ["reversed"] * reverse
    folder = point.out / "patched" / point.key / "-".join([split, *names]) / when
    files = {site: folder / f"{site or UNPATCHED}.parquet" for site in chosen}
    missing = [site for site, path in files.items() if not path.is_file()]
    if missing:
        for site, replies in _stream(setting, point.adapter, setting.prompts(split, n), when, missing, reverse, progress):
            _keep(setting, files[site], replies, split)
    return pd.concat([pd.read_parquet(path) for path in files.values()], ignore_index=True)


def _every_block(model: Model, components: bool) -> list[str]:
    kinds = COMPONENTS if components else STREAMS
    return [f"blocks.{block}.{kind}" for kind in kinds for block in range(model.cfg.n_layers)]


def _stream(
    setting: Setting, adapter: Path | str, prompts: Sequence[Any], when: When, sites: Sequence[str], reverse: bool, progress: bool
) -> Iterator[tuple[str, Replies]]:
    """(site, its replies) as they finish; "" are the unpatched ones."""
    model = setting.model
    with model.holding(adapter) as held:
        source, target = (held, BASE) if reverse else (BASE, held)
        options: dict[str, Any] = {"source": source, "target": target, "max_new_tokens": setting.preset.max_new_tokens}
        found: Iterator[tuple[Sequence[str], Sequence[Generation]]] = (
            prompt_patching_stream(model, prompts, [[site] if site else [] for site in sites], progress=progress, **options)
            if when == "prompt"
            else (([site], decode_patching(model, prompts, [site], progress=progress, **options)) for site in sites)
        )
        for group, replies in found:
            site = "".join(group)
            where = {"patched": when if site else UNPATCHED, "site": site or UNPATCHED, "direction": f"{source} into {target}"}
            yield site, Replies.of(replies, **{name: [value] * len(prompts) for name, value in where.items()})


def _keep(setting: Setting, path: Path, replies: Replies, split: PromptSplit) -> None:
    """One site's replies with every judge's labels: whole or absent."""
    rubric = jobs.rubric_of(setting, split)
    graded = [replies.grade(judge, rubric=rubric).to_frame().assign(judge=judge.name) for judge in setting.judges.values()]
    jobs.write_frame(path, pd.concat(graded, ignore_index=True).assign(rubric=rubric, split=split))


def patched_rates(found: pd.DataFrame) -> RateFrame:
    """One row per run and patch: run, patched, site, block, and `summary.rates`; differences are from the run's unpatched replies, if
    they are there.

    Args:
        found: of the step `patched_replies` over the prompt, and while decoding if you like, of one split.
    """
    parts = []
    for run, rows in found.groupby("run", sort=False):
        own = f"{UNPATCHED} {UNPATCHED}" if (rows["site"] == UNPATCHED).any() else None
        arms = summary.rates(rows.assign(run=rows["patched"] + " " + rows["site"]), against=own)
        where = arms["run"].str.partition(" ")
        blocks = [block_of(site) for site in where[2]]
        about = pd.DataFrame({"run": run, "patched": where[0], "site": where[2], "block": pd.array(blocks, dtype="Int64")})
        parts.append(pd.concat([about, arms.drop(columns="run")], axis=1))
    return RateFrame(pd.concat(parts, ignore_index=True))
