"""Blocking at further sites, at which plain fine-tuning's shift is there again in spite of blocking (docs/reemergence.md)

    python experiments/blocking_sites.py --out results/reemergence --publish

Goes on in the folder of experiments/reemergence.py, with the arms that come back most there (it trains them where they are missing). The
sites are chosen on the core prompts, for all seeds together, by `returning_sites`. At each of them the re-emerged checkpoint is searched
for the latents that it uses there, with the same SAE recipe and pipeline as at the site itself; then training starts again from base with
K and these latents blocked, each at its own site. As a control as many random latents are blocked there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import quickstart
import reemergence_pages as pages
import torch
import tyro
from arms import percent
from quickstart import DOMAIN
from reemergence import ReemergenceSetting, Run, Workers, curve, measured, peak, prepare, reported
from reemergence import Settings as Before

from blockem_tl import Blocking, LatentSet, discover, load_sae, median_norm, organism, random_latents, shift_by_site
from blockem_tl.analysis.rerouting.depth import returning_sites
from blockem_tl.data.chat import encode_examples
from blockem_tl.evaluation.statistics import clustered_rate, paired_difference
from blockem_tl.models.activations import block_of
from blockem_tl.storage import files
from blockem_tl.training.defence import Defence
from blockem_tl.views import comparisons


@dataclass(frozen=True)
class WiderRun(Run):
    """An arm with K blocked, and latents at the outputs of further ``blocks``; in a control these are random."""

    blocks: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """For tables."""
        return f"{super().label}, also at {_blocks(self.blocks)}{', random latents there' if self.control else ''}"

    @property
    def folder(self) -> str:
        """Its name on disk."""
        return "-and-".join([super().folder.removesuffix("-random"), *map(str, self.blocks)]) + ("-random" if self.control else "")


@dataclass(frozen=True, kw_only=True)
class Settings(Before):
    """As for reemergence.py.

    kinds: block (LoRA on all blocks) and frozen (up to the blocked site): of each the arm that comes back most.
    margin: by how much more of plain's shift must be there than at the blocked site.
    """

    kinds: tuple[str, ...] = ("frozen", "block")
    margin: float = 0.1


# ---------------------------------------------------------------------------------------------- one seed


class SitesSetting(ReemergenceSetting):
    """One seed's setting, which can block at the output of every block."""

    def depth(self, arm: Run, epoch: float) -> None:
        """The sites at which plain's shift is in the checkpoint too, reading plain's replies to the core prompts: this chooses."""
        rows = self.said_by(Run("plain"), epoch, to="core")
        with self.beside_plain(arm, epoch) as both:
            found = shift_by_site(self.model, rows, **both, progress=False)
        files.write_text(depth_file(self.folder(arm), epoch), found.frame.assign(seed=self.seed).to_csv(index=False))

    def find(self, arm: Run, epoch: float, block: int) -> None:
        """The latents that the checkpoint uses at another block's output, and as many random ones that fire there."""
        sae = sae_at(block)
        with self.model.using(self.checkpoint(arm, epoch)):
            provenance = {"domain": DOMAIN, "seed": self.seed, "arm": arm.label, "epoch": epoch}
            found = discover(
                self.model, sae, self.judge, self.data.core,
                scale=self.scale(block), config=self.preset.discovery, provenance=provenance, progress=False,
            )  # fmt: skip
            alive = quickstart.alive_latents(self, sae)
        drawn = random_latents(sae, len(found.latent_set), seed=self.seed, among=alive, exclude=found.latent_set.latents)
        with files.finished_folder(site_folder(self.folder(arm), epoch, block)) as temporary:
            found.latent_set.save(temporary / "latents.json")
            drawn.save(temporary / "random.json")
            files.write_text(temporary / "candidates.csv", found.to_frame().to_csv(index=False))

    def scale(self, block: int) -> float:
        """s at a block's output, on base."""
        with self.model.using("base"):
            return median_norm(self.model, output(block), encode_examples(self.model.tokenizer, organism.reference_texts()))

    def defences(self, arm: Run) -> list[Defence]:
        """K at its site, what was found at the others. The penalty grows with the square of a site's scale, so lambda is divided by it."""
        if not isinstance(arm, WiderRun):
            return super().defences(arm)
        own = block_of(self.preset.site) or 0
        targets = {own: (self.latents, self.sae)} | {block: (self.found(arm, block), sae_at(block)) for block in arm.blocks}
        weights = [arm.weight * (self.scale(own) / self.scale(block)) ** 2 for block in sorted(targets)]
        return [Blocking(targets=[targets[block] for block in sorted(targets)], weight=weights)]

    def found(self, arm: WiderRun, block: int) -> LatentSet:
        """The latents that are blocked at a further site."""
        narrow = Run(arm.kind, arm.weight)
        folder = site_folder(self.folder(narrow), peak(self.mine, self.seed, narrow)[0], block)
        return LatentSet.load(folder / ("random.json" if arm.control else "latents.json"), sae_at(block))


def output(block: int) -> str:
    """The site that is a block's output."""
    return f"blocks.{block}.hook_resid_post"


def sae_at(block: int) -> Any:
    """The organism's SAE there."""
    return load_sae("organism", output(block))


def depth_file(folder: Path, epoch: float) -> Path:
    """Path of the shift-by-site table, on the core prompts."""
    return folder / f"core-depth-epoch-{epoch:g}.csv"


def site_folder(folder: Path, epoch: float, block: int) -> Path:
    """Folder of the latents that a checkpoint uses at another block's output."""
    return folder / f"found-epoch-{epoch:g}-block-{block}"


# ---------------------------------------------------------------------------------------------- the experiment


def run(settings: Settings) -> None:
    """Everything."""
    prepare(settings)
    with Workers(settings, SitesSetting) as workers:
        peaks = workers.dissected(settings.kinds)
        chosen = [(seed, arm, epoch) for arm, epochs in peaks.items() for seed, epoch in epochs.items()]
        workers.each("depth", "depth", [(s, (arm, e), depth_file(settings.folder(s, arm), e)) for s, arm, e in chosen])
        depth = {arm: read_depth(settings, arm, epochs) for arm, epochs in peaks.items()}
        blocks = {arm: chosen_blocks(settings, frame) for arm, frame in depth.items()}
        wanted = [(s, (arm, e, b), site_folder(settings.folder(s, arm), e, b)) for s, arm, e in chosen for b in blocks[arm]]
        workers.each("find", "find", wanted)
        wider = {arm: WiderRun(arm.kind, arm.weight, blocks=found) for arm, found in blocks.items() if found}
        both = [arm for one in wider.values() for arm in (one, replace(one, control=True))]
        workers.make("block", [(seed, arm) for arm in both for seed in settings.seeds])
    write(settings, wider, depth)


def read_depth(settings: Settings, arm: Run, epochs: dict[int, float]) -> pd.DataFrame:
    """The shift-by-site table of a dissected arm, all seeds."""
    return pd.concat(pd.read_csv(depth_file(settings.folder(seed, arm), e)).assign(of=arm.label) for seed, e in epochs.items())


def chosen_blocks(settings: Settings, depth: pd.DataFrame) -> tuple[int, ...]:
    """The blocks at whose outputs is blocked as well, the same for all seeds."""
    return tuple(block for site in returning_sites(depth, pages.SITE, margin=settings.margin) if (block := block_of(site)) is not None)


def compared(settings: Settings, narrow: Run, arm: Run) -> dict[str, Any]:
    """An arm at the last epoch, in per cent, and its difference to the arm that blocks K alone, prompt by prompt."""
    last, before = ([reported(measured(settings, seed, one)[-1]) for seed in settings.seeds] for one in (arm, narrow))
    row: dict[str, Any] = {"of": narrow.label, "label": arm.label, "seeds": len(last)}
    for rate in ("em", "incoherence", "adherence"):
        row |= percent(rate, clustered_rate([one[rate] for one in last]))
    row |= percent("difference", paired_difference([one["em"] for one in before], [one["em"] for one in last]))
    row["em_by_seed"] = [100 * sum(one["em"]) / len(one["em"]) for one in last]
    return row | {loss: sum(one[loss] for one in last) / len(last) for loss in ("sft_loss", "blocking_loss")}


def write(settings: Settings, wider: dict[Run, WiderRun], depth: dict[Run, pd.DataFrame]) -> None:
    """Curves, the comparison at the last epoch, and the shares of plain's shift that chose the sites."""
    arms = {arm: [arm, one, replace(one, control=True)] for arm, one in wider.items()}
    curves = [row for found in arms.values() for arm in found for row in curve(settings, arm, {s: arm for s in settings.seeds})]
    last = [compared(settings, narrow, arm) for narrow, found in arms.items() for arm in found]
    shares = pd.concat(depth.values())
    frames = {"sites-curves": pd.DataFrame(curves), "sites": pd.DataFrame(last), "sites-depth": shares}
    replies = pd.DataFrame(shares[shares["role"] == "reply"])
    tables = {"sites": [pages.sites_row(row) for row in last], "sites-depth": pages.depth_rows(replies)}
    figures = {"sites": comparisons.reemergence(frames["sites-curves"])}
    pages.write_all(settings.out, frames, tables, figures, publish=settings.publish)


def _blocks(blocks: Sequence[int]) -> str:
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(map(str, blocks))}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(tyro.cli(Settings, description=__doc__))
