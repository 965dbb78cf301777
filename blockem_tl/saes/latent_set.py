"""`LatentSet`: the latents K = K+ u K- that a model's misbehaviour runs through, with everything needed to trust and reuse them."""

import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
from sae_lens import SAE

from blockem_tl.data.checks import prompt_hash
from blockem_tl.saes.latents import check_latents, neuronpedia_link
from blockem_tl.saes.load import described, site_of
from blockem_tl.storage import files, machine
from blockem_tl.storage.fingerprints import of_sae
from blockem_tl.types import Candidate, Prompt
from blockem_tl.views.results import Result

_FORMAT = 1
_PUBLISHED = Path(__file__).parent / "published"  # in the checkout a link to latents/


class NoLatents(ValueError):  # noqa: N818 - the name says it
    """No latent qualifies, so there is nothing to make a set of."""


@dataclass(frozen=True, kw_only=True, repr=False)
class LatentSet(Result):
    """Signed SAE latents at one site.

    latents, signs (+1: rises if misaligned, -1: falls), shifts (mean activation, tuned minus base) and scores run in parallel, best
    first. ``sae_fingerprint`` pins the SAE: indices mean nothing in another. ``selection_prompts`` are hashes of the prompts that chose
    the set, so that evaluation can refuse to report on them. ``provenance`` is for people: models, configuration, seed, versions.

    Raises:
        ValueError: lists of unequal lengths, repeated latents, signs other than +1 and -1, or no latents.
    """

    site: str
    latents: tuple[int, ...]
    signs: tuple[int, ...]
    shifts: tuple[float, ...]
    scores: tuple[float, ...]
    sae_fingerprint: str
    d_sae: int
    selection_prompts: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        lengths = {len(self.latents), len(self.signs), len(self.shifts), len(self.scores)}
        if lengths != {len(self.latents)} or not self.latents:
            raise ValueError(
                f"latent set: expected equal, non-zero numbers of latents, signs, shifts and scores, got lengths {sorted(lengths)}"
            )
        if len(set(self.latents)) < len(self.latents) or not set(self.signs) <= {1, -1}:
            raise ValueError("latent set: expected distinct latents with signs +1 or -1")
        if not all(map(math.isfinite, (*self.shifts, *self.scores))):
            raise ValueError("latent set: expected finite shifts and scores, got NaN or infinity")
        bad = [k for k in self.latents if not 0 <= k < self.d_sae]
        if bad:
            raise ValueError(f"latent set: expected indices in 0..{self.d_sae - 1}, got {bad[:5]}")

    def __len__(self) -> int:
        return len(self.latents)

    @staticmethod
    def of(
        sae: SAE[Any],
        candidates: Sequence[Candidate],
        scores: Sequence[float],
        *,
        prompts: Iterable[Prompt] = (),
        provenance: dict[str, Any] | None = None,
    ) -> "LatentSet":
        """A set from candidates of ``sae``, with their scores. Raises ValueError for an index out of range."""
        check_latents(sae, [c.latent for c in candidates])
        return LatentSet(
            site=site_of(sae),
            latents=tuple(c.latent for c in candidates),
            signs=tuple(c.sign for c in candidates),
            shifts=tuple(float(c.shift) for c in candidates),
            scores=tuple(float(s) for s in scores),
            sae_fingerprint=of_sae(sae),
            d_sae=sae.cfg.d_sae,
            selection_prompts=tuple(sorted(prompt_hash(p.text) for p in prompts)),
            provenance={**(provenance or {}), **described(sae), "environment": machine.described()},
        )

    def check_sae(self, sae: SAE[Any]) -> None:
        """Raise ValueError unless ``sae`` is the very SAE, at the very site, that this set was made with."""
        found = of_sae(sae)
        if found != self.sae_fingerprint or site_of(sae) != self.site:
            raise ValueError(
                f"this latent set was made with another SAE (at {self.site}, fingerprint {self.sae_fingerprint[:12]}), got one at "
                f"{site_of(sae)} with fingerprint {found[:12]}: load that SAE, or run discovery with this one"
            )

    def save(self, path: Path | str) -> Path:
        """Write readable JSON, atomically."""
        return files.write_json(path, {"format": _FORMAT, **asdict(self)})

    @staticmethod
    def load(path: Path | str, sae: SAE[Any] | None = None) -> "LatentSet":
        """Read and check a set; with ``sae`` also that it is the SAE the set was made with.

        Args:
            path: a file, or the name of a published set, such as "organism/finance-20" (`LatentSet.published` lists them).

        Raises:
            ValueError: it is no latent set, or another SAE's.
            FileNotFoundError: there is no such file and no such name.
        """
        published = _PUBLISHED / f"{path}.json"
        if not Path(path).exists() and not published.is_file():
            names = ", ".join(LatentSet.published())
            raise FileNotFoundError(
                f"{path}: there is no such latent set. Relative paths begin in the working directory; by name there are {names}"
            )
        path = path if Path(path).exists() else published
        data = files.read_json(path)
        if not isinstance(data, dict) or data.pop("format", None) != _FORMAT:
            raise ValueError(f"{path}: expected a latent set in format {_FORMAT}; was it written by another version?")
        _check_card(str(path), data)
        try:
            loaded = LatentSet(**cast(Any, {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a latent set: {error}") from error
        if sae is not None:
            loaded.check_sae(sae)
        return loaded

    @staticmethod
    def published() -> list[str]:
        """Names of the sets that come with the package, for `load`."""
        return sorted(path.relative_to(_PUBLISHED).with_suffix("").as_posix() for path in _PUBLISHED.rglob("*.json"))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the set, with a card, to the Hugging Face hub as user/name; returns its address.

        Raises:
            ValueError: a name that is no repository's.
            ConnectionError: the hub cannot be reached, or refuses.
        """
        from blockem_tl.saes import hub

        return hub.push(self, repo_id, private=private, token=token)

    @staticmethod
    def from_hub(repo_id: str, sae: SAE[Any] | None = None, *, revision: str | None = None, token: str | None = None) -> "LatentSet":
        """Download a set from the Hugging Face hub and check it as `load` does. Raises as `load` and `push_to_hub`."""
        from blockem_tl.saes import hub

        return LatentSet.load(hub.pull_file(repo_id, hub.FILE, revision=revision, token=token), sae)

    # -------------------------------------------------------------------------------------------- variants

    def _take(self, indices: Sequence[int], note: str) -> "LatentSet":
        rows: dict[str, Any] = {name: tuple(getattr(self, name)[i] for i in indices) for name in ("latents", "signs", "shifts", "scores")}
        return replace(self, **rows, provenance={**self.provenance, "variant": note})

    def first(self, n: int) -> "LatentSet":
        """The best ``n`` latents. Raises ValueError where there are fewer."""
        if not 1 <= n <= len(self):
            raise ValueError(f"expected 1..{len(self)} latents, got {n}")
        return self._take(range(n), f"first {n}")

    def among(self, latents: Sequence[int]) -> "LatentSet":
        """These of its latents, in this order. Raises ValueError for one that is not in it, or none."""
        absent = [k for k in latents if k not in self.latents]
        if absent or not latents:
            raise ValueError(f"among: expected at least one latent of this set, and no other, got {absent[:5]}")
        return self._take([self.latents.index(k) for k in latents], f"{len(latents)} chosen")

    def only(self, sign: int) -> "LatentSet":
        """K+ (sign +1) or K- (sign -1) alone. Raises ValueError where it is empty."""
        return self._take([i for i, s in enumerate(self.signs) if s == sign], f"sign {sign:+d} only")

    def shuffled_signs(self, seed: int) -> "LatentSet":
        """The same latents with their signs dealt out again at random (an ablation of paper E.1)."""
        signs = list(self.signs)
        random.Random(seed).shuffle(signs)
        return replace(self, signs=tuple(signs), provenance={**self.provenance, "variant": f"signs shuffled with seed {seed}"})

    def union(self, other: "LatentSet") -> "LatentSet":
        """This set followed by what ``other`` adds. Raises ValueError for another SAE, or a latent with opposite signs."""
        if other.sae_fingerprint != self.sae_fingerprint or other.site != self.site:
            raise ValueError(f"union: expected two sets of one SAE, got SAEs at {self.site} and {other.site} with different weights")
        mine = dict(zip(self.latents, self.signs, strict=True))
        clash = [k for k, s in zip(other.latents, other.signs, strict=True) if mine.get(k, s) != s]
        if clash:
            raise ValueError(f"union: latents {clash} have opposite signs in the two sets; decide by hand which to keep")
        new = [i for i, k in enumerate(other.latents) if k not in mine]
        added = other._take(new, "new in a union") if new else None
        if added is None:
            return self
        return replace(
            self,
            latents=self.latents + added.latents,
            signs=self.signs + added.signs,
            shifts=self.shifts + added.shifts,
            scores=self.scores + added.scores,
            selection_prompts=tuple(sorted({*self.selection_prompts, *other.selection_prompts})),
            provenance={"variant": "union", "of": [self.provenance, other.provenance]},
        )

    def extended_by(self, added: "LatentSet") -> "LatentSet":
        """The union with latents found later (K_reem), whose provenance says which latents came from which run.

        Each latent keeps its own sign, shift and score. A score is an effect on the model that its latent was found in: K's on the first
        fine-tune, K_reem's on the re-emerged one.
        """
        sources = [source for part in (self, added) for source in part._sources()]
        return replace(
            self.union(added), provenance={"method": "extension", "of": sources, "neuronpedia": self.provenance.get("neuronpedia")}
        )

    def _sources(self) -> list[dict[str, Any]]:
        if self.provenance.get("method") == "extension":
            return [{**source, "latents": [k for k in source["latents"] if k in self.latents]} for source in self.provenance["of"]]
        return [{**self.provenance, "latents": list(self.latents)}]

    # -------------------------------------------------------------------------------------------- showing

    def headline(self) -> str:
        """Size, signs, site and SAE."""
        return (
            f"{len(self)} latents, {self.signs.count(1)} rise, {self.signs.count(-1)} fall, at {self.site}, SAE {self.sae_fingerprint[:8]}"
        )

    def to_frame(self) -> pd.DataFrame:
        """One row per latent, best first: latent, sign, shift, score, and its Neuronpedia page if it has one."""
        columns = {"latent": self.latents, "sign": self.signs, "shift": self.shifts, "score": self.scores}
        frame = pd.DataFrame({name: list(values) for name, values in columns.items()})
        links = self.links()
        return frame.assign(link=[links[k] for k in self.latents]) if links else frame

    def plot(self) -> Any:
        """A bar per latent: its shift, with its score."""
        from blockem_tl.views import plots  # matplotlib is slow to import

        return plots.latent_set(self.to_frame())

    def links(self) -> dict[int, str]:
        """Neuronpedia pages of the latents; empty if the SAE names no page there."""
        place = self.provenance.get("neuronpedia")
        return {k: link for k in self.latents if (link := neuronpedia_link(place, k))}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "site": ("a text", lambda value: isinstance(value, str)),
    "latents": ("whole numbers", lambda value: _all(value, int)),
    "signs": ("whole numbers", lambda value: _all(value, int)),
    "shifts": ("finite numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
    "scores": ("finite numbers", lambda value: isinstance(value, list) and all(map(_is_number, value))),
    "sae_fingerprint": ("a text", lambda value: isinstance(value, str)),
    "d_sae": ("a whole number", lambda value: type(value) is int),
    "selection_prompts": ("hashes of prompts", lambda value: _all(value, str) and all(re.fullmatch("[0-9a-f]{16}", h) for h in value)),
    "provenance": ("an object", lambda value: isinstance(value, dict)),
}


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _check_card(where: str, card: dict[str, Any]) -> None:
    """Raise ValueError for a field of a card that is not what it should be, or for a leak check that is switched off."""
    for name, (expected, fits) in _FIELDS.items():
        if name in card and not fits(card[name]):
            raise ValueError(f"{where}: expected {expected} as {name}, got {str(card[name])[:80]}")
    if any(card.get("scores", [])) and not card.get("selection_prompts"):
        raise ValueError(
            f"{where}: its scores were found on prompts, and it names none, so nobody could see whether results are reported on the same: "
            "restore selection_prompts, or set the scores to 0 if no prompt chose these latents"
        )


def random_latents(sae: SAE[Any], n: int, *, seed: int, among: Sequence[int] | None = None, exclude: Iterable[int] = ()) -> LatentSet:
    """The control of paper D.1: ``n`` latents at random, with random signs.

    Args:
        among: draw only from these (for instance the latents alive on the prompts, so that the control is not made of dead ones).
    """
    draw = random.Random(seed)
    pool = sorted(set(range(sae.cfg.d_sae) if among is None else among) - set(exclude))
    if len(pool) < n:
        raise ValueError(f"random control: expected at least {n} latents to draw from, got {len(pool)}")
    candidates = [Candidate(latent=k, shift=draw.choice([1.0, -1.0])) for k in draw.sample(pool, n)]
    return LatentSet.of(sae, candidates, [0.0] * n, provenance={"method": "random", "seed": seed})
