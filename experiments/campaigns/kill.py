"""Is anything lost when a long command is killed? Each is killed at random moments, run again, killed again, until it ends.

    python experiments/campaigns/kill.py --kills 200 --json kill.json
    python experiments/campaigns/kill.py --kills 20 --commands finetune train-sae --seed 3

What lies there in the end is compared with an uninterrupted run's, file by file and to the last bit; dates, times and peak memory are left
out. A kill has failed if the same command does not go on, ends elsewhere, makes a finished part again, or if half-written files stay.

Half of the kills are at the n-th file that the command opens for writing, moves or removes (n is drawn, and does not depend on the
machine's speed), the others after a part of the uninterrupted run's time. A command runs in a fork of this process, which has imported
everything and done nothing else: it calls the function that the `blockem` command calls. The signal is SIGKILL.
"""

import os
import random
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from kill_commands import Command, commands, prepare, register
from kill_process import Ended, run
from kill_results import again, differences, finished_parts, leftovers
from tqdm.auto import tqdm

from blockem_tl.storage import files
from blockem_tl.views.progress import progress_bar
from blockem_tl.views.tables import show

MOST = 8  # kills of one command before it is let run to its end
SURVIVED = "survived"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of the campaign. ``names``: of commands, all by default."""

    kills: int = 200
    seed: int = 0
    names: Annotated[tuple[str, ...], tyro.conf.arg(name="commands")] = ()
    progress: bool = True
    json_path: Annotated[Path | None, tyro.conf.arg(name="json")] = None


def campaign(command: Command, n: int, folder: Path, *, seed: int, bar: Any = None) -> dict[str, Any]:
    """Kill a command ``n`` times, in as many runs as it takes: every kill with its outcome, and what the uninterrupted run took."""
    draw, kills = random.Random(f"{seed} {command.name}"), list[dict[str, Any]]()
    whole = run(command.run, folder / "work")
    if whole.status:
        raise RuntimeError(f"{command.name} fails without being killed: {whole.said}")
    os.replace(folder / "work", folder / "whole")
    while len(kills) < n:
        found = _until_it_ends(command, whole, folder, draw, min(MOST, n - len(kills)))
        kills += found
        if bar is not None:
            bar.update(len(found))
    survived = sum(kill["outcome"] == SURVIVED for kill in kills)
    about = {"command": command.name, "kills": len(kills), "survived": survived}
    return {**about, "files": whole.touched, "seconds": round(whole.seconds, 2), "each": kills}


def _until_it_ends(command: Command, whole: Ended, folder: Path, draw: random.Random, most: int) -> list[dict[str, Any]]:
    """One run, killed at most so often: its kills."""
    work, kills = folder / "work", list[dict[str, Any]]()
    shutil.rmtree(work, ignore_errors=True)
    while True:
        chosen = moment(command, whole, draw) if len(kills) < most else {}
        before = finished_parts(work)
        ended = run(command.run, work, **chosen, patience=60 + 20 * whole.seconds)
        faults = [f"made again: {name}" for name in again(before, finished_parts(work))]
        if ended.status and not ended.killed:
            faults.append(f"does not go on: {ended.said}")
        if faults and kills:
            kills[-1]["outcome"] = "; ".join(faults)
        if not ended.killed:
            break
        kills.append({**chosen, "at_file": ended.touched, "at_seconds": round(ended.seconds, 3), "outcome": SURVIVED})
    wrong = [] if ended.status else [*differences(folder / "whole", work, whole.said, ended.said), *leftovers(work)]
    for kill in kills if wrong else ():
        kill["outcome"] = "; ".join([kill["outcome"], *wrong] if kill["outcome"] != SURVIVED else wrong)
    return kills


def moment(command: Command, whole: Ended, draw: random.Random) -> dict[str, Any]:
    """The file or the second of the next kill."""
    if command.by_files and whole.touched and draw.random() < 0.5:
        return {"kill_at_file": draw.randint(1, whole.touched)}
    return {"kill_after": round(draw.uniform(0, whole.seconds), 3)}


def killed(chosen: Sequence[Command], settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """A campaign for each command, with its share of the kills."""
    left, shares, rows = settings.kills, sum(one.share for one in chosen), []
    with progress_bar(total=settings.kills, show=settings.progress, unit="kill") as bar:
        for one in chosen:
            bar.set_description(one.name)
            n = round(left * one.share / shares)
            place = folder / one.name.replace(" ", "-")
            place.mkdir()
            rows.append(row := campaign(one, n, place, seed=settings.seed, bar=bar))
            left, shares = left - n, shares - one.share
            for kill in row["each"]:
                if kill["outcome"] != SURVIVED:
                    bar.write(f"{one.name}: {kill}")
    return rows


def main(settings: Settings) -> None:
    """Kill all commands, or those that are named; exit code 1 if a kill was not survived."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # no thread: this process forks
    with tempfile.TemporaryDirectory(prefix="kill-") as name:
        folder = Path(name)
        known = commands(folder)
        unknown = set(settings.names) - {one.name for one in known}
        if unknown:
            raise SystemExit(f"expected commands among {[one.name for one in known]}, got {sorted(unknown)}")
        chosen = [one for one in known if not settings.names or one.name in settings.names]
        if (made := run(lambda: prepare(folder), folder / "preparing")).status:
            raise RuntimeError(made.said)
        register(folder)
        rows = killed(chosen, settings, folder)
    show(
        [{k: f"{v}" for k, v in row.items() if k != "each"} for row in rows],
        f"{sum(row['survived'] for row in rows)} of {sum(row['kills'] for row in rows)} kills survived, seed {settings.seed}",
    )
    if settings.json_path is not None:
        files.write_json(settings.json_path, {"seed": settings.seed, "environment": files.environment(), "commands": rows})
    raise SystemExit(any(row["survived"] < row["kills"] for row in rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
