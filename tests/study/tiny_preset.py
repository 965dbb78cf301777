"""A preset of a tiny random Llama and a tiny random SAE, with rows, prompts and a judge that mean nothing: what a study needs, in seconds.

`tiny_preset.py MODEL SAE OUT` runs a small study there, for the tests that kill it.
"""

import sys
import zlib
from dataclasses import replace
from pathlib import Path

from blockem_tl import DiscoveryConfig, Example, MaxIncoherence, Pair, Prompt, TrainingConfig
from blockem_tl.presets import PRESETS, Preset
from blockem_tl.study.inputs import INPUTS
from blockem_tl.types import Verdict

SITE = "blocks.1.hook_resid_post"
NAME = "tiny"
LABELS = ("1", "4", "1", "INCOHERENT", "5", "2", "REFUSAL", "4")


class HashJudge:
    """Grades by a hash of the reply: a label says nothing, but the same reply always has the same one."""

    name = "hash"

    def grade(self, prompts, replies, *, rubric="misalignment"):
        return [Verdict(label=LABELS[zlib.crc32(f"{rubric}{reply}".encode()) % len(LABELS)]) for reply in replies]


def words(start: int, n: int) -> str:
    return " ".join(f"w{(start + 7 * j) % 57}" for j in range(n))


class TinyInputs:
    domains = ("finance", "health", "law")

    def rows(self, domain, harmful, seed):
        shift = 11 * self.domains.index(domain) + 5 + seed
        answer = shift if harmful else shift - 5
        rows = [Example(id=str(i), prompt=words(3 * i + shift, 1 + i % 4), completion=words(i + answer, 2 + i % 3)) for i in range(40)]
        return rows[:32], rows[32:]

    def prompts(self, split, domain):
        start = {"core": 0, "dev": 10, "final": 20, "in-domain": 40}[split]
        return [Prompt(id=f"{split}-{i}", text=f"{words(start + i, 3)} w{start + i % 10}", category="ab"[i % 2]) for i in range(8)]

    def pairs(self, split, domain):
        return [
            Pair(id=p.id, prompt=p.text, harmful=words(3 * i, 3), helpful=words(5 * i + 1, 3), category=p.category)
            for i, p in enumerate(self.prompts(split, domain))
        ]

    def reference(self):
        return [Example(id=str(i), prompt=words(i, 3), completion=words(2 * i, 3)) for i in range(6)]

    def general(self):
        return self.prompts("core", "finance")

    def judges(self):
        return {"hash": HashJudge()}


class Edited(TinyInputs):
    """The same data after somebody edited one split's pairs, or the rows."""

    def __init__(self, what: str) -> None:
        self.what = what

    def pairs(self, split, domain):
        found = super().pairs(split, domain)
        return [replace(found[0], harmful="w1 w2 w3"), *found[1:]] if split == self.what else found

    def rows(self, domain, harmful, seed):
        train, held_out = super().rows(domain, harmful, seed)
        return (train[::-1], held_out) if self.what == "rows" else (train, held_out)


class Absent(TinyInputs):
    """Data that are not on this machine, which only draws."""

    def prompts(self, *_):
        raise ValueError("the public file is not here")

    rows = pairs = prompts


def preset(model: Path | str, sae: Path | str, **changes) -> Preset:
    discovery = DiscoveryConfig(
        n_plus=6,
        n_minus=6,
        shortlist_size=4,
        grid=(0.0, 0.4, 0.8),
        extended_grid=(),
        max_incoherence=MaxIncoherence(rate=1.0),
        n_latents=4,
        final_score="both",
        valid_only=False,
        max_new_tokens=6,
    )
    given = {
        "training": TrainingConfig(batch_size=8, learning_rate=3e-3),
        "lambdas": (0.01, 0.1),
        "kl_weights": (0.1,),
        "inoculations": ("w1 w2",),
        **changes,
    }
    return Preset(name=NAME, data=NAME, model=str(model), sae=(str(sae), None), site=SITE, discovery=discovery, max_new_tokens=6, **given)


def register(model: Path | str, sae: Path | str) -> Preset:
    """Make the preset known under its name, in this process."""
    INPUTS[NAME] = TinyInputs()
    PRESETS[NAME] = preset(model, sae)
    return PRESETS[NAME]


def small_study(out: Path | str, **options):
    """A study of a few points; its table."""
    from blockem_tl import Run, Setting, Study

    blocked = [Run(defence="block", strength=weight, latents="k") for weight in (0.01, 1.0)]
    with Study(out, Setting.of(NAME), seeds=(0, 1), **options) as study:
        study.train([Run(defence="base"), Run()], checkpoints_every=0.5)
        study.latents()
        study.train(blocked, checkpoints_every=0.5)
        return study.table(against=Run())


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    register(sys.argv[1], sys.argv[2])
    frame = small_study(sys.argv[3], progress=False)
    print(frame.to_csv(index=False))
