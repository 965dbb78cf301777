"""Attribution patching as a first pass: its estimates against real patches, ranked (docs/reemergence.md).

    python experiments/attribution.py --out results/reemergence --publish

Goes on in the folder of experiments/reemergence.py, with the checkpoints that were dissected there (it trains them where they are missing).
Base's and the checkpoint's replies to the final prompts make the metric; candidates are the residual stream, attention and MLP of every
block, and all latents of the SAE; patched are the prompt's or the reply's positions.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import reemergence_pages as pages
import torch
import tyro
from reemergence import ReemergenceSetting, Run, Workers, prepare
from reemergence import Settings as Before

from blockem_tl import Generation
from blockem_tl.analysis.patching.attribution import Attribution, Positions, attribute_latents, attribute_sites
from blockem_tl.generation.steering import UNSTEERED
from blockem_tl.storage import files

KINDS = ("hook_resid_post", "hook_attn_out", "hook_mlp_out")
POSITIONS: tuple[Positions, ...] = ("prompt", "reply")


@dataclass(frozen=True, kw_only=True)
class Settings(Before):
    """As for reemergence.py.  verify: how many candidates of each kind are really patched, the largest estimates first."""

    kinds: tuple[str, ...] = ("frozen", "block")
    verify: int = 20


class AttributionSetting(ReemergenceSetting):
    """One seed's setting."""

    def attribute(self, arm: Run, epoch: float, verify: int) -> None:
        """Estimates and real effects for sites and latents at either positions."""
        with self.model.using(self.checkpoint(arm, epoch)):
            replies = self._replies()
            sites = [f"blocks.{block}.{kind}" for kind in KINDS for block in range(self.model.cfg.n_layers)]
            frames = []
            for positions in POSITIONS:
                by_site = attribute_sites(self.model, *replies, sites, positions=positions, verify=verify, progress=False)
                latents = attribute_latents(self.model, *replies, self.sae, positions=positions, verify=verify, progress=False)
                frames += [self._rows(found, name, positions) for name, found in (("sites", by_site), ("latents", latents))]
        files.write_text(attribution_file(self.folder(arm), epoch), pd.concat(frames).to_csv(index=False))

    def _replies(self) -> tuple[list[Generation], list[Generation]]:
        """The checkpoint's and base's, to the prompts that both reply to."""
        with self.model.using("base"):
            base = self.base(self.data.final, [UNSTEERED])
        pairs = [pair for pair in zip(self.tuned(self.data.final, [UNSTEERED]), base, strict=True) if all(g.reply for g in pair)]
        return [mine for mine, _ in pairs], [theirs for _, theirs in pairs]

    def _rows(self, found: Attribution, candidates: str, positions: str) -> pd.DataFrame:
        """The verified candidates; of latents whether K holds them."""
        frame = found.frame.dropna(subset=["real"])
        frame = frame.assign(in_k=frame["latent"].isin(self.latents.latents)) if "latent" in frame else frame
        known = {"candidates": candidates, "positions": positions, "metric": found.metric, "spearman": found.rank_correlation}
        return frame.assign(seed=self.seed, **known)


def attribution_file(folder: Path, epoch: float) -> Path:
    """Path of a checkpoint's estimates and real effects."""
    return folder / f"attribution-epoch-{epoch:g}.csv"


def run(settings: Settings) -> None:
    """Everything."""
    prepare(settings)
    with Workers(settings, AttributionSetting) as workers:
        chosen = [(s, arm, epoch) for arm, epochs in workers.dissected(settings.kinds).items() for s, epoch in epochs.items()]
        files = [attribution_file(settings.folder(s, arm), epoch) for s, arm, epoch in chosen]
        wanted = [(s, (arm, epoch, settings.verify), file) for (s, arm, epoch), file in zip(chosen, files, strict=True)]
        workers.each("attribute", "attribute", wanted)
    frame = pd.concat(pd.read_csv(file).assign(of=arm.label, epoch=e) for (_, arm, e), file in zip(chosen, files, strict=True))
    pages.write_all(settings.out, {"attribution": frame}, {"attribution": pages.attribution_rows(frame)}, publish=settings.publish)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(tyro.cli(Settings, description=__doc__))
