"""The house: the contracts in pyproject.toml hold, and a planted violation breaks them."""

import ast
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
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
        ("saes/load.py", "from blockem_tl import organism", "only study knows"),
        ("evaluation/evaluate.py", "from blockem_tl import advice", "only study knows"),
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


def cycle_in(package: str) -> tuple[str, ...]:
    """Modules that import each other in a ring, imports for type checking counted; empty if there are none."""
    graph = grimp.build_graph(package, cache_dir=None)
    try:
        TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).prepare()
    except CycleError as error:
        return tuple(error.args[1])
    return ()


def test_no_modules_import_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cycle_in("blockem_tl") == ()
    (tmp_path / "ring").mkdir()
    for name, line in (("__init__", ""), ("a", "import ring.b"), ("b", "TYPE_CHECKING = False\nif TYPE_CHECKING:\n    import ring.a")):
        (tmp_path / "ring" / f"{name}.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    assert set(cycle_in("ring")) == {"ring.a", "ring.b"}


def test_no_file_is_long_and_no_function_either() -> None:
    for path in (ROOT / "blockem_tl").rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno < 45, f"{path}: {node.name}"


MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|Users)/\w")


def test_no_file_holds_a_path_of_a_machine() -> None:
    assert MACHINE_PATH.search('"model": "/home/someone/models/llama"')
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, files):
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):  # weights, figures; deleted, not yet committed; a linked folder
            continue
        assert name == "tests/test_layers.py" or not MACHINE_PATH.search(text), name
