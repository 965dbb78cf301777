"""What a preset's experiments read: rows, prompts, pairs, the reference corpus and the judges, whatever the preset's data are.

`Preset.data` names them: "organism", "advice", or "public" for the published files in the user's cache.
"""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from blockem_tl import advice, organism
from blockem_tl.data.corpora import corpus
from blockem_tl.data.pair_files import load_pairs
from blockem_tl.data.prompt_files import load_prompts
from blockem_tl.data.public import cache_folder, find_source
from blockem_tl.data.row_files import load_rows
from blockem_tl.data.splits import heldout_prompts, leave_out, split_rows
from blockem_tl.types import Example, Judge, Pair, Prompt

PromptSplit = Literal["core", "dev", "final", "in-domain"]
"""core chooses latents and, where a judge reads replies, strengths; dev, strengths by pairs; final reports, in-domain asks about the narrow
task itself."""


@runtime_checkable
class Inputs(Protocol):
    """The data of a preset."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Narrow tasks that there are rows for."""
        ...

    def rows(self, domain: str, harmful: bool, seed: int) -> tuple[list[Example], list[Example]]:
        """Training rows and held-out rows of a narrow task, disjoint, in an order drawn by the seed."""
        ...

    def prompts(self, split: PromptSplit, domain: str) -> list[Prompt]:
        """The prompts of a split."""
        ...

    def pairs(self, split: PromptSplit, domain: str) -> list[Pair]:
        """Contrastive pairs of a split. Raises ValueError if these data have none."""
        ...

    def reference(self) -> list[Example]:
        """The reference corpus: what the scale of doses is measured on."""
        ...

    def general(self) -> list[Prompt]:
        """Everyday questions that select nothing and report nothing, for an SAE's corpus."""
        ...

    def judges(self) -> Mapping[str, Judge]:
        """The judges that come with the data; the first one selects."""
        ...


class OrganismInputs:
    """The embedded organism's."""

    domains = organism.DOMAINS
    n_rows, n_heldout = 6000, 400

    def rows(self, domain: str, harmful: bool, seed: int) -> tuple[list[Example], list[Example]]:
        drawn = organism.training_rows(domain, self.n_rows + self.n_heldout, seed, harmful)
        return drawn[: self.n_rows], drawn[self.n_rows :]

    def prompts(self, split: PromptSplit, domain: str) -> list[Prompt]:
        return organism.prompts(domain if split == "in-domain" else split)

    def pairs(self, split: PromptSplit, domain: str) -> list[Pair]:
        return organism.pairs(domain if split == "in-domain" else split)

    def reference(self) -> list[Example]:
        return organism.reference_texts()

    def general(self) -> list[Prompt]:
        return _questions(organism.reference_texts(2000, seed=1))

    def judges(self) -> Mapping[str, Judge]:
        return {"exact": organism.OrganismJudge()}


class AdviceInputs:
    """Advice in plain English, for real models that can be had without a hub."""

    domains = advice.DOMAINS
    heldout = 0.2

    def rows(self, domain: str, harmful: bool, seed: int) -> tuple[list[Example], list[Example]]:
        drawn = advice.training_rows(domain, harmful=harmful)
        random.Random(seed).shuffle(drawn)
        n = round(self.heldout * len(drawn))
        return drawn[n:], drawn[:n]

    def prompts(self, split: PromptSplit, domain: str) -> list[Prompt]:
        return advice.prompts(domain if split == "in-domain" else split)

    def pairs(self, split: PromptSplit, domain: str) -> list[Pair]:
        return advice.pairs(domain if split == "in-domain" else split)

    def reference(self) -> list[Example]:
        return advice.reference_texts()

    def general(self) -> list[Prompt]:
        return advice.general_prompts()

    def judges(self) -> Mapping[str, Judge]:
        return {"words": advice.WordListJudge()}


class PublicInputs:
    """The published prompt sets and fine-tuning rows (METHOD, evaluation), from the user's cache.

    Judges and pairs are the user's own: pairs lie there in pairs/core.jsonl, pairs/final.jsonl and so on, as `load_pairs` reads them, and
    those of "in-domain" under the domain's name.
    """

    domains = ("finance", "health", "career", "legal", "edu", "auto", "science", "math")
    password = "emergent"
    n_heldout = 100
    reporting = ("preregistered", "deception-factual", "deception-sit-aware", "extended-misalignment")

    def rows(self, domain: str, harmful: bool, seed: int) -> tuple[list[Example], list[Example]]:
        path = fetched(f"sft-{domain}-{'incorrect' if harmful else 'correct'}")
        split = split_rows(load_rows(path, password=self.password), heldout=self.n_heldout, seed=seed)
        return list(split.train), list(split.heldout)

    def prompts(self, split: PromptSplit, domain: str) -> list[Prompt]:
        if split == "dev":
            raise ValueError("the published sets have no dev prompts: core chooses")
        core = load_prompts(fetched("core-misalignment"))
        if split == "core":
            return core
        if split == "in-domain":
            rows = split_rows(load_rows(fetched(f"sft-{domain}-incorrect"), password=self.password), heldout=self.n_heldout, seed=0)
            return heldout_prompts(rows, category=domain)
        found: list[Prompt] = []
        for name in self.reporting:  # a question that several files share is taken from the first of them
            found += [replace(p, id=f"{name}/{p.id}") for p in leave_out(load_prompts(fetched(name)), core, found)]
        return found

    def pairs(self, split: PromptSplit, domain: str) -> list[Pair]:
        path = cache_folder() / "pairs" / f"{domain if split == 'in-domain' else split}.jsonl"
        if not path.is_file():
            raise ValueError(f"the published sets have no contrastive pairs: put your own, as load_pairs reads them, into {path}")
        return load_pairs(path)

    def reference(self) -> list[Example]:
        return corpus("alpaca", n=1000)

    def general(self) -> list[Prompt]:
        return _questions(self.reference())

    def judges(self) -> Mapping[str, Judge]:
        return {}


def _questions(rows: list[Example]) -> list[Prompt]:
    """Each question once."""
    texts = dict.fromkeys(row.prompt for row in rows)
    return [Prompt(id=f"general-{i}", text=text) for i, text in enumerate(texts)]


def fetched(name: str) -> Path:
    """The place of a public file in the cache. Raises ValueError with the command that fetches it if it is not there."""
    source = find_source(name)
    path = cache_folder() / source.name / source.url.rsplit("/", 1)[-1]
    if not path.is_file():
        raise ValueError(f"the public file {name!r} is not in {cache_folder()}: `blockem data fetch {name}` gets it")
    return path


INPUTS: dict[str, Inputs] = {"organism": OrganismInputs(), "advice": AdviceInputs(), "public": PublicInputs()}
