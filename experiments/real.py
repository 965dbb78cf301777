"""The method on a real model: what blocking can reach at most, and what it and its rivals reach at plain's loss.

    python experiments/real.py --preset smollm2-135m --seeds 0 1 2 --out results/real

Every arm learns the narrow task until its loss on dev rows is within 3 % of plain's. A strength is the cost in nats of plain's own change
under the penalty (`mean_penalty`), so that strengths of different defences compare; it is chosen on the core pairs. The final pairs are
looked at once, at the end. Broken off, the same command goes on: what is trained is not trained again.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pandas as pd
import tyro

from blockem_tl import (
    Blocking,
    KLToBase,
    Model,
    Setting,
    completion_loss,
    finetune,
    latents_by_attribution,
    mean_penalty,
    mediation,
    preference,
    random_latents,
    share_removed,
)
from blockem_tl.defences.ldifs import LDIFS
from blockem_tl.storage import files
from blockem_tl.training.defence import Defence
from blockem_tl.views import tables

LATER = 6  # steps between looks at the dev loss


@dataclass(frozen=True, kw_only=True)
class Options:
    """preset: any with contrastive pairs and an SAE.  domain: the narrow task.  n_latents: of K.  strengths: in nats, tried for every
    defence.  within: of plain's dev loss, where an arm stops.  longest: in epochs."""

    preset: str = "smollm2-135m"
    seeds: tuple[int, ...] = (0,)
    out: Path = Path("results/real")
    domain: str = "finance"
    n_latents: int = 600
    strengths: tuple[float, ...] = (5.0, 15.0)
    within: float = 1.03
    longest: float = 1.6
    progress: bool = True


class Seed:
    """One seed: the plain fine-tune, K, and every arm, kept in a folder."""

    def __init__(self, options: Options, seed: int) -> None:
        self.options, self.seed = options, seed
        self.folder = options.out / f"{options.preset}-{options.domain}-seed{seed}"
        self.setting = Setting.of(options.preset, seed=seed, domain=options.domain)
        self.dev, self.test = self.setting.held_out()[::2], self.setting.held_out()[1::2]
        self.plain = self.arm("plain", None, 0.0)

    def latents(self) -> Any:
        """K, by attribution on the core pairs, and what it and others can reach at most."""
        setting, plain = self.setting, self.folder / "plain"
        k = latents_by_attribution(setting.model, setting.sae, setting.pairs("core"), self.options.n_latents, adapter=plain)
        table = self.folder / "ceiling.csv"
        if not table.is_file():
            roles: Any = [("reply",), ("prompt", "reply")]
            sizes = [n for n in (60, 200) if n < len(k)]
            where = {"adapter": plain, "sizes": sizes, "one_sided": True, "roles": roles}
            found = mediation(setting.model, setting.sae, setting.pairs("core"), self.dev, {"attribution": k}, **where)
            files.write_text(table, found.to_frame().to_csv(index=False))
        return k

    def defences(self) -> dict[str, Defence]:
        """Every defence, with weight 1."""
        sae, k = self.setting.sae, self.latents()
        block: dict[str, Any] = {"sae": sae, "weight": 1.0, "positions": "all", "reference": "live"}
        random = random_latents(sae, len(k), seed=self.seed, exclude=k.latents)
        return {
            "blocked": Blocking(latent_set=k, **block),
            "blocked, error anchored": Blocking(latent_set=k, error_anchor=1.0, **block),
            "random latents": Blocking(latent_set=random, **block),
            "random latents, error anchored": Blocking(latent_set=random, error_anchor=1.0, **block),
            "residual anchor": LDIFS(sites=[self.setting.site], weight=1.0, positions="all"),
            "KL": KLToBase(weight=1.0),
        }

    def arm(self, name: str, defence: Defence | None, nats: float, longer: bool = False) -> dict[str, Any]:
        """Train an arm, if it is not there yet; what it is on core and dev."""
        model, options, folder = self.setting.model, self.options, self.folder / name.replace(", ", "-").replace(" ", "-")
        if (folder / "adapter_model.safetensors").is_file():
            return {"arm": name, "nats": nats, "folder": folder, **self.measured(folder, "core", self.dev)}
        config, stop = self.setting.training, None
        if defence is not None:
            price = mean_penalty(model, defence, self.setting.rows(n=64), adapter=self.folder / "plain", batch_size=16)
            defence = replace(cast(Any, defence), weight=nats / price)
            stop = partial(self.learnt, options.within * self.plain["loss"])
        if defence is not None or longer:
            config = replace(config, epochs=options.longest)
        defences = [] if defence is None else [defence]
        rows, show = self.setting.rows(), options.progress
        finetune(model, rows, config=config, defences=defences, adapter="arm", overwrite=True, stop_when=stop, progress=show)
        model.save_adapter(folder, "arm")
        return self.arm(name, defence, nats)

    def learnt(self, within: float, model: Model, step: int) -> bool:
        """Whether the arm knows the task as plain does."""
        return step % LATER == 0 and completion_loss(model, self.dev) <= within

    def measured(self, adapter: Path | str, split: Any, rows: list[Any]) -> dict[str, Any]:
        """Margins of a split's pairs and the loss on rows, kept."""
        kept = self.folder / "measured" / f"{Path(adapter).name}-{split}.json"
        if not kept.is_file():
            model = self.setting.model
            margins = preference(model, self.setting.pairs(split), adapter=adapter, progress=False).margins[0]
            files.write_json(kept, {"margins": margins.tolist(), "loss": completion_loss(model, rows, adapter=adapter)})
        return files.read_json(kept)

    def chosen(self) -> list[dict[str, Any]]:
        """Of every defence the strength with the least core margin, of those that learnt the task within 5 % of plain's dev loss."""
        found = []
        for name, defence in self.defences().items():
            arms = [self.arm(f"{name}, {nats:g}", defence, nats) for nats in self.options.strengths]
            learnt = [arm for arm in arms if arm["loss"] <= 1.05 * self.plain["loss"]] or [min(arms, key=lambda arm: arm["loss"])]
            found.append(min(learnt, key=lambda arm: sum(arm["margins"])) | {"defence": name})
        longer = self.arm("plain, as long", None, 0.0, longer=True)
        return [self.plain | {"defence": "plain"}, longer | {"defence": "plain, as many epochs"}, *found]


def table(options: Options) -> pd.DataFrame:
    """One row per arm: of the seeds together, on pairs and rows that chose nothing."""
    seeds = [Seed(options, seed) for seed in options.seeds]
    arms = [seed.chosen() for seed in seeds]  # everything is chosen before the final pairs are looked at
    rows = []
    for column in zip(*arms, strict=True):
        final, home = (
            [seed.measured(arm["folder"], split, seed.test) for seed, arm in zip(seeds, column, strict=True)]
            for split in ("final", "in-domain")
        )
        base = [seed.measured("base", "final", seed.test) for seed in seeds]
        plain = [seed.measured(seed.folder / "plain", "final", seed.test) for seed in seeds]
        margins = [[one["margins"] for one in side] for side in (base, plain, final)]
        loss = sum(one["loss"] / other["loss"] for one, other in zip(final, plain, strict=True)) / len(seeds) - 1
        rows.append(
            {
                "arm": column[0]["defence"],
                "strengths, nats": ", ".join(f"{arm['nats']:g}" for arm in column),
                "prefers harm, %": f"{share(final):.1f}",
                "of the margin's shift gone": str(share_removed(*margins)),
                "loss on unseen rows": f"{100 * loss:+.1f} %",
                "in-domain pairs, %": f"{share(home):.1f}",
            }
        )
    return pd.DataFrame(rows)


def share(measured: list[dict[str, Any]]) -> float:
    """The share of pairs that prefer harm, in per cent."""
    return 100 * sum(margin > 0 for one in measured for margin in one["margins"]) / sum(len(one["margins"]) for one in measured)


def main(options: Options) -> None:
    found = table(options)
    files.write_text(options.out / f"{options.preset}-{options.domain}.csv", found.to_csv(index=False))
    tables.show(found.to_dict("records"), f"{options.preset}, {options.domain}, {len(options.seeds)} seeds")


if __name__ == "__main__":
    main(tyro.cli(Options))
