"""The house: the contracts in pyproject.toml hold, and a planted violation breaks them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"})


def test_each_room_imports_only_from_those_below() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("room", "line", "broken"),
    [
        ("models/load.py", "from blockem_tl.discovery.pipeline import discover", "each imports only from those below it"),
        (
            "types.py",
            "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    from blockem_tl.hooks import Hook",
            "each imports only from those below it",
        ),
        ("judging/judge.py", "from blockem_tl.models.load import load_model", "judging knows rows"),
        ("saes/load.py", "from blockem_tl import organism", "no room knows the organism"),
        ("views/tables.py", "import torch", "no torch"),
    ],
)
def test_a_planted_violation_breaks_a_contract(tmp_path: Path, room: str, line: str, broken: str) -> None:
    ignore = shutil.ignore_patterns("artefacts", "__pycache__")
    shutil.copytree(ROOT / "blockem_tl", tmp_path / "blockem_tl", ignore=ignore)
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    with (tmp_path / "blockem_tl" / room).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode != 0
    assert any(broken in text and "BROKEN" in text for text in done.stdout.splitlines()), done.stdout


def test_six_modules_lie_at_the_root() -> None:
    found = sorted(path.name for path in (ROOT / "blockem_tl").glob("*.py"))
    assert found == ["__init__.py", "cli.py", "doctor.py", "hooks.py", "presets.py", "types.py"]
