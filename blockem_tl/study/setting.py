"""`Setting`: everything that an experiment needs of a preset, each part loaded when it is first used::

setting = Setting.of("organism")  # or "smollm2-135m", "llama-3.1-8b"
finetune(setting.model, setting.rows(), config=setting.training, adapter="plain")
discover(setting.model, setting.sae, setting.judge, setting.prompts("core"), scale=setting.scale(), config=setting.preset.discovery)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sae_lens import SAE

from blockem_tl.data.chat import apply_system
from blockem_tl.data.checks import check_disjoint
from blockem_tl.data.splits import spread
from blockem_tl.generation.engine import Engine, TransformerLensEngine, load_engine
from blockem_tl.models.activations import block_of, median_norm
from blockem_tl.models.load import Model, load_model
from blockem_tl.presets import Preset, get_preset
from blockem_tl.saes.load import check_fits, load_sae
from blockem_tl.study.inputs import INPUTS, Inputs, PromptSplit
from blockem_tl.training.config import TrainingConfig
from blockem_tl.types import Example, Judge, Pair, Prompt


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A preset with a seed and a narrow task. Pickled, it is these few words, and a worker loads its own model.

    seed: of the draws of rows and of training.  domain: the narrow task.
    own_judges: judges by name in the place of those that come with the preset's data; the first one selects.

    Rows, prompts and pairs are under the preset's system prompt policy.
    """

    preset: Preset
    seed: int = 0
    domain: str = "finance"
    own_judges: Mapping[str, Judge] = field(default_factory=dict)

    @classmethod
    def of(cls, preset: str | Preset, *, seed: int = 0, domain: str | None = None, judges: Mapping[str, Judge] | None = None) -> "Setting":
        """The setting of a preset.

        Raises:
            ValueError: an unknown preset, or a domain that it has no rows for.
        """
        chosen = get_preset(preset) if isinstance(preset, str) else preset
        domains = INPUTS[chosen.data].domains
        domain = domain or chosen.domain
        if domain not in domains:
            raise ValueError(f"setting: preset {chosen.name!r} has rows of {', '.join(domains)}, got the domain {domain!r}")
        return cls(preset=chosen, seed=seed, domain=domain, own_judges=dict(judges or {}))

    def at(self, *, seed: int, domain: str = "") -> "Setting":
        """The same preset with another seed and narrow task ("": this one); model, SAE and scale are loaded once for both.

        Raises:
            ValueError: a domain that the preset has no rows for.
        """
        other = Setting.of(self.preset, seed=seed, domain=domain or self.domain, judges=self.own_judges)
        other.__dict__["_loaded"] = self._loaded
        return other

    def elsewhere(self, release: str, sae_id: str | None = None) -> "Setting":
        """The same data and model with another SAE, and so at that SAE's site, with its own scale.

        Raises:
            ValueError: an SAE that does not fit the model.
        """
        sae = load_sae(release, sae_id)
        other = replace(self, preset=replace(self.preset, sae=(release, sae_id), site=check_fits(sae, self.model)))
        other.__dict__["_loaded"] = {"model": self.model, "sae": sae}
        return other

    @cached_property
    def _loaded(self) -> dict[str, Any]:
        return {}

    @property
    def loaded(self) -> bool:
        """Whether the model is loaded."""
        return "model" in self._loaded

    def _once(self, name: str, load: Callable[[], Any]) -> Any:
        if name not in self._loaded:
            self._loaded[name] = load()
        return self._loaded[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"inputs": self.inputs, **{name: getattr(self, name) for name in self.__dataclass_fields__}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        INPUTS.setdefault(state["preset"].data, state.pop("inputs"))  # data of your own are known in a worker too
        self.__dict__.update(state)

    @property
    def inputs(self) -> Inputs:
        """The preset's data."""
        return INPUTS[self.preset.data]

    @property
    def model(self) -> Model:
        """The model, in the preset's dtype."""
        return self._once("model", lambda: load_model(self.preset.model, dtype=self.preset.dtype))

    def engine(self, name: str = "transformer_lens", adapters: Mapping[str, str] | None = None, **options: Any) -> Engine:
        """The engine of that name on the preset's model: `load_engine`. vLLM starts once, and only one of it is kept."""
        if name == "transformer_lens":
            return TransformerLensEngine(self.model, **options)
        wanted = repr((name, sorted((adapters or {}).items()), sorted(options.items())))
        kept: tuple[str, Any] | None = self._loaded.get("engine")
        if kept is None or kept[0] != wanted:
            self.close()
            made = load_engine(name, model=self.preset.model, adapters=adapters, dtype=self.preset.dtype, sites=[self.site], **options)
            kept = self._loaded["engine"] = (wanted, made)
        return kept[1]

    def close(self) -> None:
        """Stop vLLM if it was started: a process that still has it does not end."""
        if "engine" in self._loaded:
            self._loaded.pop("engine")[1].close()

    @property
    def sae(self) -> SAE[Any]:
        """The SAE at `site`."""
        return self._once("sae", lambda: load_sae(*self.preset.sae))

    @property
    def site(self) -> str:
        """The site that is read and blocked."""
        return self.preset.site

    @property
    def up_to_site(self) -> dict[str, int | None]:
        """Override of a run with LoRA only up to the site's block: what lies downstream stays frozen."""
        return {"up_to_block": block_of(self.site)}

    @property
    def training(self) -> TrainingConfig:
        """The preset's hyperparameters of training, with this seed."""
        return replace(self.preset.training, seed=self.seed)

    @cached_property
    def judges(self) -> Mapping[str, Judge]:
        """All judges by name; the first one selects.

        Raises:
            ValueError: neither the preset's data nor you brought one.
        """
        found = self.own_judges or self.inputs.judges()
        if not found:
            raise ValueError(
                f"preset {self.preset.name!r} brings no judge: name one with --judge-models and --judge-urls; in Python pass "
                "Setting.of(..., judges={name: LLMJudge(backend=Endpoint(model=..., base_url=...))}). `blockem doctor` checks an endpoint"
            )
        return found

    @property
    def judge(self) -> Judge:
        """The judge that selects."""
        return next(iter(self.judges.values()))

    def rows(self, domain: str | None = None, n: int | None = None, *, harmful: bool = True) -> list[Example]:
        """Training rows of a narrow task (this setting's by default), the first ``n`` in the seed's order.

        Raises:
            ValueError: an unknown domain, or fewer rows than ``n``.
        """
        return self._first(self.inputs.rows(domain or self.domain, harmful, self.seed)[0], n, "training rows")

    def held_out(self, n: int | None = None, *, domain: str | None = None, harmful: bool = True) -> list[Example]:
        """Rows of the narrow task that are not trained on, for losses. Raises as `rows`."""
        return self._first(self.inputs.rows(domain or self.domain, harmful, self.seed)[1], n, "held-out rows")

    def _first(self, rows: list[Example], n: int | None, what: str) -> list[Example]:
        if n is not None and not 1 <= n <= len(rows):
            raise ValueError(f"preset {self.preset.name!r} has {len(rows)} {what}, got n={n}")
        return apply_system(rows[:n], self.preset.system)

    def prompts(self, split: PromptSplit, n: int | None = None, *, domain: str | None = None) -> list[Prompt]:
        """The prompts of a split, or ``n`` of them, all categories as evenly as it allows. "core" and "final" are checked to be disjoint.

        Raises:
            ValueError: a leak between them, a public file that is not in the cache, or fewer prompts than ``n``.
        """
        if split == "final":
            check_disjoint(self.inputs.prompts("core", self.domain), self.inputs.prompts("final", self.domain))
        return apply_system(spread(self.inputs.prompts(split, domain or self.domain), n), self.preset.system)

    def pairs(self, split: PromptSplit, n: int | None = None, *, domain: str | None = None) -> list[Pair]:
        """Contrastive pairs of a split, for `preference`; ``n`` as for `prompts`. Raises ValueError if the preset's data have none."""
        return apply_system(spread(self.inputs.pairs(split, domain or self.domain), n), self.preset.system)

    def reference(self) -> list[Example]:
        """The reference corpus, for the unit of doses."""
        return apply_system(self.inputs.reference(), self.preset.system)

    def general_prompts(self) -> list[Prompt]:
        """Everyday questions that select nothing and report nothing, for an SAE's corpus."""
        return apply_system(self.inputs.general(), self.preset.system)

    def scale(self) -> float:
        """s, the unit of doses: the median norm at the site under base, over the reference corpus (paper A.3)."""
        return self._once("scale", lambda: median_norm(self.model, self.site, self.reference()))
