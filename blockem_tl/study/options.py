"""The options that every experiment over a study takes on the command line, and the study and page that they make."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from blockem_tl.judging.endpoint import Endpoint
from blockem_tl.judging.judge import LLMJudge
from blockem_tl.presets import Preset, get_preset
from blockem_tl.saes.load import load_sae, site_of
from blockem_tl.study.page import Page
from blockem_tl.study.setting import Setting
from blockem_tl.study.study import Study
from blockem_tl.types import Judge

PRESET = "organism"


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Options of an experiment; one of your own inherits from it and sets ``name``.

    preset: see `blockem presets`.  domain: the narrow task that latents are found on; the preset's by default.
    model, sae, sae_id: in the place of the preset's, as `load_model` and `load_sae` take them; the site is the SAE's. The preset's lambdas
    are in its own SAE's units.
    seeds: of training.  out: tables, figures and the study, results/NAME-PRESET-DOMAIN by default: what is finished there is not run again.
    shared_study: a study's folder in the place of out/study, which several experiments share, so that what they have in common runs once.
    publish: also renew the documentation.  executor: "local" or "ray".  workers: processes.  n_rows: training rows, all by default.
    judge_models, judge_urls: judging models and their endpoints (one for all, or one each), for presets without a judge; the first selects.
    """

    preset: str = PRESET
    domain: str | None = None
    model: str | None = None
    sae: str | None = None
    sae_id: str | None = None
    seeds: tuple[int, ...] = (0,)
    out: Path | None = None
    shared_study: Path | None = None
    publish: bool = False
    executor: str = "local"
    workers: int | None = None
    n_rows: int | None = None
    judge_models: tuple[str, ...] = ()
    judge_urls: tuple[str, ...] = ("http://127.0.0.1:8000/v1",)
    progress: bool = True
    name: ClassVar[str] = "study"

    @property
    def folder(self) -> Path:
        """Where tables, figures and, unless it is shared, the study lie."""
        return self.out or Path("results") / self.title

    @property
    def variant(self) -> str:
        """Which of its pages, where the experiment has two."""
        return ""

    @property
    def title(self) -> str:
        """Of the page: the experiment, its preset, and what else tells it apart."""
        own = (re.sub(r"[^\w.]+", "_", part).strip("_") for part in (self.model, self.sae, self.sae_id) if part)
        return "-".join(part for part in (self.name, self.preset, *own, self.domain, self.variant) if part)

    def chosen(self) -> Preset:
        """The preset, with the model and the SAE that were named. Raises ValueError for an SAE that is none, or names no site."""
        preset = get_preset(self.preset)
        preset = replace(preset, model=self.model or preset.model)
        if self.sae or self.sae_id:
            name = self.sae or preset.sae[0]
            preset = replace(preset, sae=(name, self.sae_id), site=site_of(load_sae(name, self.sae_id)))
        return preset

    def judges(self) -> Mapping[str, Judge] | None:
        """The judging endpoints that were named. Raises ValueError for another number of addresses than one, or one each."""
        n, urls = len(self.judge_models), self.judge_urls
        if n and len(urls) not in (1, n):
            raise ValueError(f"judges: expected one address, or one for each of {n} models, got {len(urls)}")
        each = urls if len(urls) == n else urls * n
        made = {m: LLMJudge(backend=Endpoint(model=m, base_url=u)) for m, u in zip(self.judge_models, each, strict=False)}
        return made or None

    def setting(self, seed: int = 0) -> Setting:
        """The preset's setting; on a CPU in one thread, which is as fast and gives the same bits on every machine of its kind."""
        if not torch.cuda.is_available():
            torch.set_num_threads(1)
        return Setting.of(self.chosen(), seed=seed, domain=self.domain, judges=self.judges())

    def study(self, **options: Any) -> Study:
        """The study beside the page."""
        common = {"seeds": self.seeds, "executor": self.executor, "workers": self.workers, "n_rows": self.n_rows, "progress": self.progress}
        return Study(self.shared_study or self.folder / "study", self.setting(), **{**common, **options})

    def page(self) -> Page:
        """The page of tables and figures beside the study; published under docs/ of the working directory if asked for."""
        return Page(self.folder, docs=Path("docs") if self.publish else None, name=self.title)
