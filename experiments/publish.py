"""Put a demo's table and figure, and the table over seeds, where people read them: docs/results/quickstart/, README.md, docs/organism.md.

python experiments/publish.py --results results/quickstart --seeds results/quickstart results/quickstart-seed1 results/quickstart-seed2
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from blockem_tl.storage import files
from blockem_tl.views import tables

ROOT = Path(__file__).parent.parent
KEPT = ("summary.json", "table.md", "tradeoff.png", "candidates.csv")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """results: folder written by experiments/quickstart.py.  seeds: such folders, one per seed."""

    results: Path = ROOT / "results" / "quickstart"
    seeds: tuple[Path, ...] = (ROOT / "results" / "quickstart",)


def publish(results: Path, seeds: Sequence[Path], root: Path = ROOT) -> None:
    """Copy the results and renew the tables. Raises FileNotFoundError where a demo has not run."""
    missing = [folder / name for folder in {results, *seeds} for name in (*KEPT, "latents.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]} is missing: run `make demo` (or quickstart.py with that --seed and --out) first")
    target = root / "docs" / "results" / "quickstart"
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(results / name, target / name)
    summaries = [files.read_json(folder / "summary.json") for folder in seeds]
    sets = root / "latents" / "organism"
    sets.mkdir(parents=True, exist_ok=True)
    for folder, summary in zip(seeds, summaries, strict=True):
        shutil.copyfile(folder / "latents.json", sets / f"finance-20-seed{summary['settings']['seed']}.json")
        files.write_json(target / "seeds" / f"seed{summary['settings']['seed']}.json", summary)
    renew(root / "README.md", "quickstart", (results / "table.md").read_text(encoding="utf-8"))
    renew(root / "docs" / "organism.md", "seeds", tables.markdown([row for summary in summaries for row in seed_rows(summary)]))


def renew(page: Path, marker: str, table: str) -> None:
    """Put ``table`` between the page's markers."""
    files.write_text(page, tables.between(page.read_text(encoding="utf-8"), marker, table))


def seed_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    """One row per arm of one seed's run, with intervals."""

    def rate(arm: dict[str, Any], name: str) -> str:
        return f"{arm[name]:.1f} [{arm[name + '_low']:.1f}, {arm[name + '_high']:.1f}]"

    rows = []
    for name in ("base", "sft", "blocked", "blocked_all_tokens", "random", "matched", "kl"):
        arm = summary[name]
        rows.append(
            {
                "seed": str(summary["settings"]["seed"]),
                "model": arm["label"],
                "EM %": rate(arm, "em"),
                "relative EM reduction %": rate(arm, "relative_em_reduction") if "relative_em_reduction" in arm else "",
                "incoherence %": rate(arm, "incoherence"),
                "adherence %": rate(arm, "adherence"),
                "SFT loss": f"{arm['sft_loss']:.4f}",
            }
        )
    return rows


if __name__ == "__main__":
    settings = tyro.cli(Settings, description=__doc__)
    publish(settings.results, settings.seeds)
