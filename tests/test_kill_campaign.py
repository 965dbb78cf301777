"""The kill campaign with a few kills, and commands of which it has to say that they lose something."""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from blockem_tl.storage import files

CAMPAIGNS = Path(__file__).parents[1] / "experiments" / "campaigns"
sys.path.insert(0, str(CAMPAIGNS))

from kill import SURVIVED, campaign, moment  # noqa: E402
from kill_commands import Command  # noqa: E402
from kill_process import Ended  # noqa: E402


def parts(write: Callable[[str, str], object]) -> Callable[[], None]:
    """A command of six parts that makes those that are missing."""

    def work() -> None:
        for i in range(6):
            Path(str(i)).mkdir(exist_ok=True)
            if not Path(f"{i}/run.json").exists():
                write(f"{i}/run.json", json.dumps(i))

    return work


def in_place(name: str, text: str) -> None:
    with open(name, "w") as file:
        os.chmod(name, 0o644)  # a moment at which it is empty
        file.write(text)


def without_tidying(name: str, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=".", prefix=".half.")
    os.close(handle)
    Path(temporary).write_text(text)
    os.rename(temporary, name)


def from_the_start() -> None:
    for i in range(6):
        files.write_json(f"{i}/run.json", i)


def stubborn() -> None:
    os.mkdir("once")
    from_the_start()


def counting() -> None:
    starts = Path("starts.txt")
    starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
    parts(files.write_text)()


@pytest.mark.parametrize(
    ("work", "fault"),
    [
        (parts(files.write_text), ""),
        (parts(in_place), "differs: "),
        (parts(without_tidying), "half-written: .half."),
        (from_the_start, "made again: "),
        (stubborn, "does not go on: "),
        (counting, "differs: starts.txt"),
    ],
)
def test_what_a_command_loses_is_noticed(work: Callable[[], None], fault: str, tmp_path: Path) -> None:
    found = campaign(Command(name="it", run=work), 12, tmp_path, seed=0)
    outcomes = [kill["outcome"] for kill in found["each"]]
    assert found["kills"] == len(outcomes) == 12 and found["survived"] == outcomes.count(SURVIVED)
    assert any(fault in outcome for outcome in outcomes) if fault else found["survived"] == 12


def test_the_moments_are_the_same_with_the_same_seed() -> None:
    whole = Ended(status=0, killed=False, touched=50, seconds=2.0, said="")
    draws = [random.Random(f"{seed} it") for seed in (0, 0, 1)]
    first, again, other = ([moment(Command(name="it", run=stubborn), whole, draw) for _ in range(40)] for draw in draws)
    assert first == again != other
    files_, times = ({one[key] for one in first if key in one} for key in ("kill_at_file", "kill_after"))
    assert len(files_) > 5 and len(times) > 5 and max(files_) <= 50 and max(times) <= 2
    without = Command(name="it", run=stubborn, by_files=False)
    assert all("kill_after" in moment(without, whole, draws[0]) for _ in range(20))


@pytest.mark.slow
def test_a_few_kills_of_real_commands_are_survived(tmp_path: Path) -> None:
    options = ["--kills", "9", "--seed", "5", "--no-progress", "--json", str(tmp_path / "kill.json")]
    command = [sys.executable, str(CAMPAIGNS / "kill.py"), *options, "--commands", "finetune", "train-sae", "evaluate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "kill.json").read_text())["commands"]
    assert [(row["command"], row["kills"], row["survived"]) for row in rows] == [
        ("finetune", 3, 3),
        ("evaluate", 3, 3),
        ("train-sae", 3, 3),
    ]
    assert all(row["files"] > 10 and len(row["each"]) == 3 for row in rows)
