"""Put a demo's table and figure where people read them: docs/results/quickstart/ and the README.

python experiments/publish.py --results results/quickstart
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from blockem_tl import records, report

ROOT = Path(__file__).parent.parent
KEPT = ("summary.json", "table.md", "tradeoff.png", "candidates.csv")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """results: folder written by experiments/quickstart.py."""

    results: Path = ROOT / "results" / "quickstart"


def publish(results: Path, root: Path = ROOT) -> None:
    """Copy the results and renew the README's table. Raises FileNotFoundError where the demo has not run."""
    missing = [name for name in KEPT if not (results / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{results} lacks {missing}: run `make demo` first")
    target = root / "docs" / "results" / "quickstart"
    target.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(results / name, target / name)
    readme = root / "README.md"
    records.write_text(
        readme, report.between(readme.read_text(encoding="utf-8"), "quickstart", (results / "table.md").read_text(encoding="utf-8"))
    )


if __name__ == "__main__":
    publish(tyro.cli(Settings, description=__doc__).results)
