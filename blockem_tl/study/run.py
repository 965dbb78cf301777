"""`Run`: one way to train, and `Point`: a place at which a study measures something (a run, a seed, and perhaps an epoch of it)."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from sae_lens import SAE

from blockem_tl.models.lora import BASE
from blockem_tl.saes.latent_set import LatentSet
from blockem_tl.storage.fingerprints import of_bytes
from blockem_tl.training.checkpoints import trajectory
from blockem_tl.training.config import TrainingConfig

PLAIN, REPAIR = "plain", "repair"
UNTRAINED = (BASE, REPAIR)
_TRAINING = {one.name for one in fields(TrainingConfig)} - {"seed"}
_LABELS = {BASE: "base", PLAIN: "plain", "block": "blocked", "kl": "KL", "ldifs": "LDIFS", "caft": "CAFT", "safelora": "SafeLoRA",
           "preventative": "preventative steering", "interleaving": "safe rows", "repair": "test-time steering"}  # fmt: skip
_LONGEST = 100  # characters of a folder's name


@dataclass(frozen=True, kw_only=True)
class Run:
    """One way to train, whatever the seed. It names its own folder and label.

    defence: "plain", "base" (which is not trained), "repair" (plain's weights steered away from misalignment while they reply, at a dose
        as strength: not trained either), or one of the study's defences, see `study.defences`.
    strength: lambda, or what the defence has instead.
    unit: "weight", or "nats": strength is what plain fine-tuning's own change costs under the penalty (`mean_penalty`, of plain's adapter
        of the same seed and task), so that strengths of different defences compare.
    matched: stop as soon as the dev loss is at most so many times plain's; 0: train all epochs.
    latents: the name of a latent set of the study, for defences that act on latents.
    domain: the narrow task; "": the study's.
    overrides: fields of `TrainingConfig`; all others are arguments of the defence (``{"positions": "all"}``). Kept as sorted pairs.
    name: in the place of the label.

    Raises:
        ValueError: a strength or latents for a run without a defence, an override that no one takes, a seed (which is the study's), an
            unknown unit, or ``matched`` below 1.
    """

    defence: str = PLAIN
    strength: float = 0.0
    unit: Literal["weight", "nats"] = "weight"
    matched: float = 0.0
    latents: str = ""
    domain: str = ""
    overrides: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        pairs = tuple(sorted(dict(self.overrides).items()))
        object.__setattr__(self, "overrides", pairs)
        object.__setattr__(self, "strength", float(self.strength))
        if self.defence in (PLAIN, BASE) and (self.strength or self.latents):
            raise ValueError(f"run: {self.defence!r} has neither strength nor latents, got {self.strength:g} and {self.latents!r}")
        if self.unit not in ("weight", "nats") or (self.unit == "nats" and not self.strength > 0):
            raise ValueError(f"run: expected the unit 'weight', or 'nats' with a strength > 0, got {self.unit!r} and {self.strength:g}")
        if self.matched and not (1 <= self.matched < float("inf") and self.trained):
            raise ValueError(f"run: expected matched >= 1 (times plain's dev loss) of a trained run, or 0, got {self.matched}")
        unused = [name for name, _ in pairs if name == "seed" or (self.defence in (PLAIN, BASE) and name not in _TRAINING)]
        if unused:
            raise ValueError(f"run: {unused} are no hyperparameters of a run that is {self.defence!r}; the seeds are the study's")

    @property
    def trained(self) -> bool:
        """Whether the run has weights of its own."""
        return self.defence not in UNTRAINED

    @property
    def training(self) -> dict[str, Any]:
        """The overrides of the training's hyperparameters."""
        return {name: value for name, value in dict(self.overrides).items() if name in _TRAINING}

    @property
    def arguments(self) -> dict[str, Any]:
        """The overrides that are the defence's."""
        return {name: value for name, value in dict(self.overrides).items() if name not in _TRAINING}

    @property
    def label(self) -> str:
        """For tables and figures: "blocked, λ = 0.3, random, up_to_block = 2". The domain is a column of its own."""
        if self.name:
            return self.name
        symbol, unit = ("", " nats") if self.unit == "nats" else ("λ = " if self.defence == "block" else "", "")
        strength, matched = f"{symbol}{self.strength:g}{unit}", f"to {self.matched:g} x plain's loss"
        parts = [_LABELS.get(self.defence, self.defence), strength if self.strength else "", self.latents, matched if self.matched else ""]
        return ", ".join([part for part in parts if part] + [f"{name} = {value}" for name, value in dict(self.overrides).items()])

    @property
    def folder(self) -> str:
        """Its name on disk: what trains otherwise lies elsewhere; a label changes nothing."""
        unit = "nats" if self.unit == "nats" else ""
        matched = f"matched={self.matched:g}" if self.matched else ""
        parts = [self.defence, f"{self.strength:g}{unit}" if self.strength else "", self.latents, self.domain, matched]
        words = [part for part in parts if part] + [f"{name}={value}" for name, value in dict(self.overrides).items()]
        text = re.sub(r"[^\w.+=,-]", "_", "-".join(words))
        exact = text == "-".join(words) and len(text) <= _LONGEST
        return text if exact else f"{text[:_LONGEST]}-{of_bytes(repr(words).encode())[:8]}"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run of one seed, at its end or at one of its checkpoints: what a step of a study measures.

    out: the study's folder.  epoch: of a checkpoint; None: the trained adapter.
    """

    run: Run
    seed: int = 0
    epoch: float | None = None
    out: Path = field(default=Path("."), compare=False)

    @property
    def key(self) -> str:
        """Its name on disk, and in messages."""
        return f"seed{self.seed}/{self.run.folder}" + (f"@{self.epoch:g}" if self.epoch is not None else "")

    @property
    def folder(self) -> Path:
        """Folder of the run: run.json, adapter/ and checkpoints/."""
        return self.out / f"seed{self.seed}" / self.run.folder

    @property
    def plain(self) -> "Point":
        """Plain fine-tuning of the same seed and task, to which ``Run.unit`` and ``Run.matched`` refer."""
        return replace(self, run=Run(domain=self.run.domain), epoch=None)

    @property
    def adapter(self) -> Path | str:
        """What `model.using` and every ``adapter=`` take: "base", or a folder.

        Raises:
            ValueError: no checkpoint at this epoch.
        """
        if self.run.defence == BASE:
            return BASE
        if not self.run.trained:
            return self.plain.adapter
        if self.epoch is None:
            return self.folder / "adapter"
        found = dict(trajectory(self.folder / "checkpoints"))
        if self.epoch not in found:
            raise ValueError(f"{self.key}: expected one of the epochs {sorted(found)}; train(..., checkpoints_every=...) makes them")
        return found[self.epoch]

    def latents_file(self, name: str = "") -> Path:
        """Place of a latent set of the study, by default the one that the run acts on."""
        return self.out / f"seed{self.seed}" / "latents" / f"{name or self.run.latents}.json"

    def latents(self, sae: SAE[Any] | None = None, name: str = "") -> LatentSet:
        """A latent set of the study for this seed, by default the one that the run acts on. Raises as `LatentSet.load`."""
        return LatentSet.load(self.latents_file(name), sae)

    def columns(self) -> dict[str, Any]:
        """What tells points apart, as columns of a table."""
        run = self.run
        about = {
            "run": run.label,
            "defence": run.defence,
            "strength": run.strength,
            "unit": run.unit,
            "latents": run.latents,
            "domain": run.domain,
        }
        return {**about, "overrides": json.dumps(dict(run.overrides)), "seed": self.seed, "epoch": self.epoch}
